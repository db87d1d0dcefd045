"""A batch job's way to the replicas of a live application (`label --app`). Can be taken away.

May import `faults` and `models`. Read shared_model.py, then shared_engine.py.
"""
