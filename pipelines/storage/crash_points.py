"""Where this process dies on purpose, so that tests can aim a SIGKILL at a step of the commit
protocol.

GLM_BATCH_CRASH_AT=POINT:N[@FILE] kills the process that reaches POINT for the N-th time; with FILE,
only the first process that gets there. Nothing happens without the variable. The points, in the
order of a run:

    before_plan  after_plan           plan.json
    before_lease after_lease          the record of who owns the output
    before_journal after_journal      some answers of a unit that stays long in the engine
    before_part  before_rename  after_part    a unit's rows (rename: any local file that replaces)
    before_record  before_link  after_record  its commit record (link: any that must be first)
    before_manifest  after_manifest
    before_export    after_export     a batch file's answers (after: export.json is to come)
    before_delete                     each file that gc removes
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "GLM_BATCH_CRASH_AT"
_reached: Counter[str] = Counter()


def reach(point: str) -> None:
    """Says that this process is at `point`; it may be the last thing that it does."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    aim, _, marker = asked.partition("@")
    wanted, _, count = aim.partition(":")
    if point != wanted:
        return
    _reached[point] += 1
    if _reached[point] == int(count or 1) and (not marker or _is_first(marker)):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
