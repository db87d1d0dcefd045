"""Which output a path on the command line means: one itself, or the version in force of a cron
output.

Owns how that is said. Where versions lie is pipelines.cron.versions'.
"""

from __future__ import annotations

import sys

from glm_batch.pipelines.cron.versions import Found, find
from glm_batch.pipelines.job import StorageSection


def opened(path: str, endpoint_url: str | None = None) -> Found:
    """The output, after a line on stderr where it is not the path itself. Raises ConfigError."""
    found = find(path, StorageSection(endpoint_url=endpoint_url))
    if found.versions is not None and found.path != path:
        is_in_force = found.versions.in_force() == found.name
        state = "is in force" if is_in_force else "is the latest begun, and none is in force yet"
        print(f"glm-batch: {path}: version {found.name} {state}", file=sys.stderr)
    return found
