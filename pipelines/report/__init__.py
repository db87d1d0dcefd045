"""Reports on outputs and sweeps: an HTML file to look at, and tables to go on with. Optional.

May import `output`, `tasks`, `evaluation` and `sweep`. Read answers.py, committed_rows.py, page.py.
"""
