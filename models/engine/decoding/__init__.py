"""What generated tokens have said so far, when they are finished, and which tokens may come next.

May import `engine.api` and `models.processing`. Read decoding.py, then constraints.py.
"""
