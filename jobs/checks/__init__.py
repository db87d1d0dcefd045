"""Whether a job makes sense: its keys together, its checkpoint, its input, its cluster.

May import `files`. Read checks.py.
"""
