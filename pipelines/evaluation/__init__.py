"""What answers are worth: metrics over rows with gold answers, their intervals, and comparisons.
Can be taken away.

Imports no other room. Read scoring.py, agreement.py, classes.py, intervals.py, reliability.py.
"""
