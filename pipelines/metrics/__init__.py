"""Counts of finished work, which stage holds a job up, and both as metrics for Prometheus.

May import `glm_actors.faults`. Read counts.py.
"""
