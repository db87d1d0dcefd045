"""The engine behind an OpenAI-compatible HTTP interface. Can be taken away.

Rooms, each of which may import those before it: `openai` (bodies to work and answers), `http`
(routes and what guards them), `replicas` (the Ray Serve application).
"""
