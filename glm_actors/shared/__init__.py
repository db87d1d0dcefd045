"""A batch job's way to the replicas of a live application (`label --app`). Can be taken away.

May import `models`. Read shared_model.py, shared_engine.py, shared_suspects.py.
"""
