"""An engine at work in a process: the thread that steps it, and the other ranks of its replica.

May import `faults` and `models`. Read engine_loop.py, then worker_group.py.
"""
