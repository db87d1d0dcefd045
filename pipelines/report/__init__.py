"""Reports on outputs and sweeps: one HTML file that a person looks at, and tables to go on with.
Can be taken away.

May import `output`, `tasks`, `evaluation` and `sweep`. Read collect.py, answers.py, page.py.
"""
