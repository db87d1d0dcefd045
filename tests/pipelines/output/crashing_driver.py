"""A driver without Ray: the commit protocol of a whole output in one process, to be killed at any
step.

Run as: crashing_driver.py FOLDER COMMAND, where COMMAND is label or gc.
"""

from __future__ import annotations

import sys

import pyarrow as pa

from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.output.manifest import is_finished, write_manifest
from glm_batch.pipelines.output.state import collect
from glm_batch.pipelines.planning.plan import Plan, PlannedFile

NUM_ROWS, UNIT_ROWS = 11, 2
SCHEMA = pa.schema({"row_key": pa.string()})


def make_plan() -> Plan:
    file = InputFile(name="a.parquet", path="/data/a.parquet", size=1, stamp="1")
    return Plan(
        identity={"task": {"prompt": "Which?"}, "input": {}},
        unit_rows=UNIT_ROWS,
        files=(PlannedFile(file=file, num_rows=NUM_ROWS),),
        duplicates={},
        schema=SCHEMA,
    )


def label(output: Output) -> None:
    plan = output.adopt(make_plan().identity) or output.begin(make_plan())
    if is_finished(output, plan):
        return
    with own(output.store) as lease:
        output.take_over(plan, b"{}")
        done = output.generations()
        for unit in plan.units():
            if unit.index not in done:
                keys = [str(row) for row in range(unit.rows.start, unit.rows.stop)]
                output.commit(
                    unit.index, pa.table({"row_key": keys}), Counts(rows=len(keys), ok=len(keys))
                )
        lease.confirm()
        write_manifest(output, plan, SCHEMA, {})


if __name__ == "__main__":
    output = Output.at(sys.argv[1])
    label(output) if sys.argv[2] == "label" else collect(output)
