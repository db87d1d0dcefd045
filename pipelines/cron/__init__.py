"""Dated versions of an output, each processing only what is new or changed. Can be taken away.

May import `runs` and below. Read incremental.py, changes.py, versions.py.
"""
