"""The HTTP interface: routes, what a request must pass first, the document and the metrics.

May import `serving.openai`. Read http_app.py, then border.py.
"""
