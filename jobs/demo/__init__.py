"""`glm-batch demo`. Can be taken away.

May import `commands`. Read demo.py.
"""
