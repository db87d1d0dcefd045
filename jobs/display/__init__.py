"""How a run looks on a terminal and in a log.

Imports no other room of jobs. Read display.py.
"""
