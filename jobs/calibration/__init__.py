"""`glm-batch calibrate`. Can be taken away.

May import `report`. Read calibrate.py.
"""
