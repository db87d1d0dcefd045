"""`glm-batch export`. Optional.

May import `report`. Read export.py.
"""
