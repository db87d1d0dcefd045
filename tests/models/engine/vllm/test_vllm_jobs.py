"""The demo jobs with engine.kind torch and vllm: every row, through the steps of the pipeline and
its model actor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.jobs.files.sections import load_job
from glm_batch.pipelines.job import TaskConfig
from glm_batch.pipelines.planning.plan import job_source
from glm_batch.pipelines.runs.pipeline import engine_config
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.tasks.rows import parse_unit, render_unit, runner_of, unit_table

EXAMPLES = Path(__file__).parents[4] / "examples"
FLOAT32, BFLOAT16 = 1e-3, 2e-2


def labelled(
    name: str,
    kind: str,
    dtype: str,
    rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> pa.Table:
    """The job's output rows; of each input file the first `rows`."""
    monkeypatch.chdir(EXAMPLES.parent)
    job, _ = load_job(
        str(EXAMPLES / f"{name}.yaml"), [f"engine.kind={kind}", f"engine.dtype={dtype}"]
    )
    job = replace(job, **changes)
    prepared = prepare(job, None)
    source = job_source(job)
    tables = []
    for unit in prepared.plan.units():
        file = prepared.plan.files[unit.file].file
        table = unit_table(source.read(file, unit.rows), unit.index, file, unit.rows.start, {})
        tables.append(render_unit(prepared.spec, table if rows is None else table.slice(0, rows)))
    actor = ModelActor(engine_config(job), 1)
    parsed = [parse_unit(prepared.spec, actor(table)) for table in tables]
    assert actor._loop is not None
    actor._loop.close()
    runner_of(prepared.spec).close()
    return pa.concat_tables(parsed).select(prepared.spec.schema.names)


def assert_same_labels(torch: pa.Table, vllm: pa.Table) -> np.ndarray:
    """Equal in all but the last digits of the probabilities; the largest difference of each good
    row.
    """
    assert torch.schema == vllm.schema
    assert torch.num_rows == 2400
    for column in ("row_key", "status", "error_code", "label", "prompt_tokens"):
        assert vllm[column].to_pylist() == torch[column].to_pylist(), column
    ok = [i for i, status in enumerate(torch["status"].to_pylist()) if status == "ok"]
    first, second = (
        np.array([table["label_probs"][i].as_py() for i in ok]) for table in (torch, vllm)
    )
    return np.abs(first - second).max(axis=1)


def test_routed_tickets_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (labelled("route", kind, "float32", None, monkeypatch) for kind in ("torch", "vllm"))
    assert assert_same_labels(*tables).max() < FLOAT32


def test_routed_tickets_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few rows between two labels either engine is as far from float32 as they are from each
    other.
    """
    tables = (labelled("route", kind, "bfloat16", None, monkeypatch) for kind in ("torch", "vllm"))
    differences = assert_same_labels(*tables)
    assert (differences < BFLOAT16).mean() > 0.995
    assert differences.max() < 2 * BFLOAT16


@pytest.mark.parametrize(("name", "column"), [("reply", "text"), ("extract", "json")])
def test_written_answers(monkeypatch: pytest.MonkeyPatch, name: str, column: str) -> None:
    torch, vllm = (labelled(name, kind, "float32", 40, monkeypatch) for kind in ("torch", "vllm"))
    assert torch.schema == vllm.schema
    texts = list(zip(torch[column].to_pylist(), vllm[column].to_pylist(), strict=True))
    assert len(texts) >= 200
    assert sum(one == other for one, other in texts) >= 0.98 * len(texts)


@pytest.mark.parametrize("completion", [None, "gold_label"])
def test_log_likelihoods(monkeypatch: pytest.MonkeyPatch, completion: str | None) -> None:
    task = TaskConfig(kind="loglikelihood", prompt="{text} ", completion=completion)
    torch, vllm = (
        labelled("route", kind, "float32", 20, monkeypatch, task=task) for kind in ("torch", "vllm")
    )
    assert torch.schema == vllm.schema
    for column in ("status", "error_code", "num_tokens"):
        assert vllm[column].to_pylist() == torch[column].to_pylist(), column
    one, other = (np.array(table["logprob"].drop_null()) for table in (torch, vllm))
    assert len(one) >= 60
    np.testing.assert_allclose(other, one, atol=FLOAT32)
