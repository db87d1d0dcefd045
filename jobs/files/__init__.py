"""YAML to dataclasses, with the place of every mistake.

May import `pipelines.job`. Read job_file.py, then sections.py.
"""
