"""What is checked and planned of an OpenAI batch file. Can be taken away.

May import `files`. Read request_checks.py, then request_plan.py.
"""
