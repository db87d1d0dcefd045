"""The plan of a job: its fingerprint, its files, and how they are cut into units.

May import `input` and `tasks`. Read plan.py.
"""
