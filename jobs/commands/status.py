"""`glm-batch status`: how far an output is, read from its plan and commit records alone. Starts no
Ray.

With `verify`, every committed part is read and compared with what its record says.
"""

from __future__ import annotations

import sys

from rich.console import Console

from glm_batch.jobs.commands.place import opened
from glm_batch.jobs.display.display import status_table
from glm_batch.pipelines.output.commit import Output

SHOWN_PROBLEMS = 20


def status(path: str, *, verify: bool = False, endpoint_url: str | None = None) -> bool:
    """Prints the state of an output. False when `verify` found damage.

    Raises ConfigError when no job has begun there.
    """
    console = Console(highlight=False)
    found = opened(path, endpoint_url)
    output = found.output
    console.print(status_table(output.status(), found.path))
    return not verify or verified(output, console)


def verified(output: Output, console: Console) -> bool:
    """Reads all committed parts and prints what is wrong with them."""
    parts = num_bytes = 0
    problems: list[str] = []
    for part, problem in output.verify():
        parts, num_bytes = parts + 1, num_bytes + part.num_bytes
        problems += [problem] if problem else []
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem, file=sys.stderr)
    more = f", {SHOWN_PROBLEMS} of them shown" if len(problems) > SHOWN_PROBLEMS else ""
    said = f"{len(problems):,} damaged{more}" if problems else "all as committed"
    console.print(f"verified {parts:,} parts, {num_bytes:,} bytes: {said}")
    return not problems
