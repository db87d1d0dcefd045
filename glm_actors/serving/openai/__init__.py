"""What OpenAI's requests mean: bodies to prompts, sampling and constraints, and completions to
answers and streams.

May import `glm_actors.media` and `models`. Read protocol.py, prompter.py, api_tasks.py,
chat_task.py, tools.py.
"""
