"""`glm-batch evaluate` and the plan of a sweep. Can be taken away.

May import `commands` and `plans`. Read evaluate.py, sweep_config.py, sweep_display.py.
"""
