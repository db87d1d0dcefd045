"""`glm-batch gc`: remove from an output what no record names, and say what that was. Starts no Ray."""

from __future__ import annotations

from rich.console import Console

from glm_batch.jobs.commands.place import opened
from glm_batch.pipelines.output.cleanup import collect


def gc(path: str, *, endpoint_url: str | None = None) -> None:
    """Prints what was removed. Raises ConfigError when there is no output, or a driver is at work
    on it.
    """
    found = opened(path, endpoint_url)
    with found.owned():
        collected = collect(found.output, found.parts_in_force())
    console = Console(highlight=False)
    for entry in collected.removed:
        console.print(f"removed {entry.name} ({entry.size or 0:,} bytes)", soft_wrap=True)
    console.print(f"removed {len(collected.removed):,} files, {collected.num_bytes:,} bytes")
    if collected.waiting:
        console.print(
            f"left {collected.waiting:,} parts of units that are not committed yet: finish the job first"
        )
