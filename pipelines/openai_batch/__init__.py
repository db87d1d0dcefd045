"""OpenAI batch files as input: lines to requests, completions to output.jsonl and errors.jsonl.

Optional. May import `tasks`, `output` and `glm_actors.serving.openai`. Read requests.py, then
answer_files.py.
"""
