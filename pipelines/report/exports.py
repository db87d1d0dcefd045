"""Probabilities of labels as NumPy files that cleanlab and others read as they are.

    FILE.npy               [rows, labels] float64, each row sums to 1
    FILE.json              the labels in the order of the columns, and which rows were left out
    FILE.rows.parquet      row_key of each row, in the same order
    FILE.labels.npy        [rows] int64, the given label's number; only where the job has gold answers

Streams: one part is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report.answers import label_names, matrix
from glm_batch.pipelines.report.committed_rows import committed_parts
from glm_batch.pipelines.report.input_rows import InputRows

KEYS = pa.schema({"row_key": pa.string()})
PROBABILITIES = {"choose": "label_probs", "classify": "scores"}
Write = Callable[[npt.NDArray[Any]], None]
FAILED, NO_GOLD, UNKNOWN_GOLD = "failed", "without_gold", "gold_outside_of_the_labels"


def write_pred_probs(output: Output, job: Job, path: str) -> dict[str, Any]:
    """Writes the files and returns what FILE.json says. Raises ConfigError for a job without such
    probabilities.
    """
    file = Path(path)
    if file.suffix != ".npy":
        raise ConfigError(f"--pred-probs: {path}: name a file that ends in .npy")
    labels = probability_labels(output, job)
    plan, num_rows, left_out = output.standing_plan(), 0, Counter[str]()
    with ExitStack() as stack:
        write_probs = stack.enter_context(npy_file(file, np.float64, (len(labels),)))
        write_given = (
            stack.enter_context(npy_file(file.with_suffix(".labels.npy"), np.int64, ()))
            if job.task.gold
            else None
        )
        keys = stack.enter_context(pq.ParquetWriter(file.with_suffix(".rows.parquet"), KEYS))
        for rows, numbers in usable_rows(output, job, plan, labels, left_out):
            write_probs(matrix(rows[PROBABILITIES[job.task.kind]]).reshape(-1, len(labels)))
            keys.write_table(rows.select(KEYS.names))
            if write_given is not None:
                write_given(numbers)
            num_rows += rows.num_rows
    said = {
        "labels": list(labels),
        "rows": num_rows,
        "left_out": {name: rows for name, rows in left_out.items() if rows},
        "row_keys": file.with_suffix(".rows.parquet").name,
        "given_labels": file.with_suffix(".labels.npy").name if job.task.gold else None,
        "output": output.place,
        "fingerprint": plan.fingerprint,
    }
    file.with_suffix(".json").write_text(
        json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return said


def usable_rows(
    output: Output, job: Job, plan: Plan, labels: Sequence[str], left_out: Counter[str]
) -> Iterator[tuple[pa.Table, npt.NDArray[np.int64]]]:
    """Each part's rows that have probabilities, and a label that was given if any is; the others
    are counted.
    """
    codes = {label: number for number, label in enumerate(labels)}
    input_rows = InputRows(job, plan)
    for unit, _, part in committed_parts(output, plan):
        kept = pc.equal(part["status"], "ok").to_numpy()
        left_out[FAILED] += int((~kept).sum())
        numbers = np.zeros(part.num_rows, np.int64)
        if job.task.gold is not None:
            numbers = _numbers(input_rows.golds(unit, part), codes, part.num_rows)
            left_out[NO_GOLD] += int((kept & (numbers == -1)).sum())
            left_out[UNKNOWN_GOLD] += int((kept & (numbers == -2)).sum())
            kept = kept & (numbers >= 0)
        yield part.filter(pa.array(kept)), numbers[kept]


@contextmanager
def npy_file(path: Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> Iterator[Write]:
    """A function that takes rows [n, *row_shape] for an .npy file, whose number is known at its end
    only.
    """
    kind, num_rows = np.dtype(dtype), 0
    with tempfile.TemporaryFile(dir=path.absolute().parent) as data:

        def write(rows: npt.NDArray[Any]) -> None:
            nonlocal num_rows
            data.write(np.ascontiguousarray(rows, kind).tobytes())
            num_rows += len(rows)

        yield write
        data.seek(0)
        shape = (num_rows, *row_shape)
        header = {
            "descr": np.lib.format.dtype_to_descr(kind),
            "fortran_order": False,
            "shape": shape,
        }
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            shutil.copyfileobj(data, stream, 1 << 20)


def probability_labels(output: Output, job: Job) -> Sequence[str]:
    plan = output.standing_plan()
    facts = output.manifest().facts if output.is_finished(plan) else {}
    if job.task.kind == "choose" or facts.get("problem_type") == "single_label_classification":
        return label_names(job.task.kind, job.task.labels, facts)
    if job.task.kind == "classify" and not facts:
        raise ConfigError(
            f"--pred-probs: {output.place} is not finished, so its labels are not known yet"
        )
    raise ConfigError(
        "--pred-probs: only choose and single-label classify give one probability for each label"
    )


def _numbers(
    golds: Sequence[Any] | None, codes: dict[str, int], num_rows: int
) -> npt.NDArray[np.int64]:
    """Each row's gold label; -1 for a row without one, -2 for one that is no label of the job."""
    found = golds if golds is not None else [None] * num_rows
    return np.array([-1 if gold is None else codes.get(str(gold), -2) for gold in found], np.int64)
