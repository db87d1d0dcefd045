"""What a row becomes for the model, and what the model's answer becomes for the reader.

May import `input`. A new kind of task is a file here and a line in kinds.py. Read prompts.py,
task.py, choose_task.py and its like, kinds.py, row_prompts.py, task_runner.py, rows.py.
"""
