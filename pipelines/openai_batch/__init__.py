"""OpenAI batch files as input: lines to requests, completions to output.jsonl and errors.jsonl. Can
be taken away.

May import `tasks`, `output` and `glm_actors.serving.openai`. Read requests.py, request_rows.py,
answer_files.py.
"""
