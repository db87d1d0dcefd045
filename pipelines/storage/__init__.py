"""Where bytes lie: directories and s3:// prefixes as the few calls that reading and committing
need.

May import `pipelines.job`. Read storage.py, then s3.py.
"""
