"""The Ray cluster a job runs on, and what each of its stages gets of it.

May import `tasks`. Read cluster.py, then shares.py.
"""
