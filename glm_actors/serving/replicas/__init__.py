"""The Ray Serve application: one ingress that speaks HTTP, one deployment for each model.

May import `serving.openai`, `serving.http`, `glm_actors.shared` and `glm_actors.engines`. Read
deployment.py, then replica.py.
"""
