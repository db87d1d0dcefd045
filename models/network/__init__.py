"""The GLM networks in plain torch: glm, glm4, glm4v with its vision tower, and the heads.

May import `models.checkpoint` and `models.network.layers`. Read glm.py top down, then
vision.py and heads.py; registry.py turns a checkpoint directory into a loaded network.
"""
