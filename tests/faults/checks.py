"""What must hold of an output after any number of kills: the rows of an undisturbed run, and
nothing else.

Owns the jobs that are run and what their undisturbed outputs were. Knows nothing of kills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import collect, verify
from tests.faults.driver import Pace

# How a row was batched with others shows in these: in how much of it was cached, and in the last
# bits of a sum.
DEPENDS_ON_COMPANY = ["cached_tokens"]
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A job without its output, at which pace, and what an undisturbed run of it gave."""

    job: dict[str, Any]
    pace: Pace
    keys: Sequence[str]
    records: pa.Table
    rows_for_engine: int


def read_records(folder: Path) -> pa.Table:
    return pa.concat_tables(Output.at(str(folder)).iter_tables()).drop_columns(DEPENDS_ON_COMPANY)


def check_output(folder: Path, workload: Workload) -> None:
    """Every row once, in order, as undisturbed; nothing damaged; no orphan named, and none left by
    `gc`.
    """
    output = Output.at(str(folder))
    records = read_records(folder)
    assert records["row_key"].to_pylist() == list(workload.keys)
    check_same(records, workload.records)
    check_parts(output)
    collect(output)
    check_parts(output)
    named = {part.name for part in output.manifest().parts}
    assert {f"parts/{path.name}" for path in (folder / "parts").iterdir()} == named
    assert [*(folder / "tmp").iterdir(), *(folder / "journal").iterdir()] == []


def check_parts(output: Output) -> None:
    """The manifest names the parts of the commit records, each undamaged."""
    assert [problem for _, problem in verify(output) if problem] == []
    plan = output.standing_plan()
    records = list(output.records(plan))
    assert [record.unit for record in records] == list(range(plan.num_units))
    assert [part.name for part in output.manifest().parts] == [record.part for record in records]


def check_same(records: pa.Table, expected: pa.Table) -> None:
    assert records.schema == expected.schema
    for name in expected.column_names:
        found, wanted = records[name], expected[name]
        if pa.types.is_list(wanted.type) and pa.types.is_floating(wanted.type.value_type):
            assert pc.list_value_length(found) == pc.list_value_length(wanted), name
            found, wanted = pc.list_flatten(found), pc.list_flatten(wanted)
        if pa.types.is_floating(wanted.type):
            assert found.is_null() == wanted.is_null(), name
            off = pc.max(pc.abs(pc.subtract(found, wanted))).as_py()
            assert off is None or off <= TOLERANCE, f"{name} is off by {off}"
        else:
            assert found == wanted, name
