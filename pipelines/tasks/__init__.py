"""What a row becomes for the model, and what the model's answer becomes for the reader.

May import `input`. Read prompts.py, tasks.py, rows.py; schema.py is the output's Arrow schema.
"""
