"""The commands on jobs and outputs: one file each, from arguments to an exit code.

May import `checks` and `display`. Read label.py.
"""
