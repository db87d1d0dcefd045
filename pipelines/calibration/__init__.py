"""Probabilities fitted to gold answers, as a file that jobs apply. Can be taken away.

May import `pipelines.job` and `evaluation`. Read calibration.py.
"""
