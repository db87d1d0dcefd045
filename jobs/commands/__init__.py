"""The commands of the core, from arguments to an exit code.

May import `checks` and `display`. Read label.py, then outputs.py.
"""
