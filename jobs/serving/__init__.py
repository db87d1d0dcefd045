"""`glm-batch serve`: a serve configuration, its checks, and the run until a signal. Can be taken
away.

May import `checks`. Read serve.py, then serve_config.py.
"""
