"""Serving: the engine loop of the batch path behind an OpenAI-compatible HTTP interface.

`app` speaks HTTP and knows no model; a `replica` owns one engine and knows no HTTP; `deploy` joins them with Ray Serve.
What a request means lies in `protocol` (its fields), `tasks` (its work for the engine and the shape of its answer).
"""
