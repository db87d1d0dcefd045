"""Input files: which there are, how many rows they hold, their rows as tables and their values as
Python.

May import `storage`. Read listing.py, source.py, values.py.
"""
