"""What is checked and planned of an OpenAI batch file. Can be taken away.

May import `plans`. Read request_plan.py.
"""
