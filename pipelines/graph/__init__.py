"""The Ray Data graph: steps over units, the stages that run them, and which replica takes a unit.

May import `tasks`, `output` and `cluster`. Read steps.py, then stages.py.
"""
