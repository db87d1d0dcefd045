"""The actors of a job: tables of requests in, tables of completions out; and CPU workers that do
steps over rows.

May import `engines`, `faults`, `media` and `shared`. Read batches.py (the contract),
model_actor.py, row_worker.py.
"""
