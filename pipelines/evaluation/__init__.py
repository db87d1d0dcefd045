"""Metrics over rows with gold answers, their intervals, and comparisons. Optional.

Imports no other room. Read scoring.py, agreement.py, intervals.py.
"""
