"""The committed output: parts, commit records and manifest, the lease of its one driver, and the
journal.

May import `storage`, `planning` and `metrics`. Read commit.py, which says the whole protocol,
then parts.py, manifest.py, lease.py and journal.py; state.py tells of an output and removes what
does not count.
"""
