"""YAML to dataclasses, with the place of every mistake.

May import `pipelines.job`. Read sections.py.
"""
