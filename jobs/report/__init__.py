"""`glm-batch report`. Can be taken away.

May import `commands`. Read report.py.
"""
