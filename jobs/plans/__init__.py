"""`glm-batch plan`: what a job would do, from its files and a sample of its rows.

May import `checks` and `display`. Read job_plan.py.
"""
