"""Finds the live application whose replicas shall run a job. Can be taken away.

May import `glm_actors.shared` and `glm_actors.serving`. Read app.py.
"""
