"""Many jobs over the same rows, run together on one set of replicas, and the table of their scores.
Can be taken away.

May import `runs` and `evaluation`. Read cells.py, sweep_run.py, sweep_steps.py, results.py.
"""
