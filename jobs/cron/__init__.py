"""`glm-batch cron`. Can be taken away.

May import `commands`. Read cron.py.
"""
