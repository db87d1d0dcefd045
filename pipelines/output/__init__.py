"""The committed output: parts, commit records and manifest, the lease of its one driver, and the
journal.

May import `storage`, `planning` and `metrics`. Read commit.py, lease.py, journal.py; cleanup.py
removes what does not count.
"""
