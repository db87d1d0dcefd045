"""Many jobs over the same rows on one set of replicas, and the table of their scores. Optional.

May import `runs` and `evaluation`. Read cells.py, sweep_run.py, bundles.py, results.py.
"""
