"""The same rows through the batch path and through a request: the same tokens, the same
probabilities.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from glm_batch.glm_actors.serving.openai.protocol import (
    Body,
    ChatRequest,
    ClassifyRequest,
    EmbeddingRequest,
    ScoreRequest,
)
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.jobs.files.sections import load_job
from glm_batch.models.engine import Completion, EngineConfig
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.task import Columns
from glm_batch.pipelines.tasks.task_runner import TaskRunner
from tests.glm_actors.serving.conftest import MODEL, ROOT, TINY
from tests.models.conftest import MakeCheckpoint, make_checkpoint

__all__ = ["make_checkpoint"]

EXAMPLES = ROOT / "examples"
NUM_ROWS = 6


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    built = TorchEngine.from_checkpoint(
        EngineConfig(model=TINY, dtype="float32", kv_cache_tokens=1 << 14)
    )
    yield built
    built.close()


def job_of(name: str) -> Job:
    return load_job(str(EXAMPLES / f"{name}.yaml"), [f"model={TINY}"])[0]


def rows_of(folder: str, job: Job, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows that can be labelled: the shards hold some that cannot."""
    name = {"support": "tickets-1", "shapes": "shapes-1", "clips": "clips-1"}[folder]
    rows = pq.read_table(EXAMPLES / folder / f"{name}.parquet").slice(0, 3 * count).to_pylist()
    runner = TaskRunner(job, job.model)
    good = [
        row
        for row, prompt in zip(rows, runner.prompts(rows), strict=True)
        if isinstance(prompt, Prompt)
    ]
    runner.close()
    return good[:count]


def _medium(row: dict[str, Any]) -> tuple[str, bytes]:
    """The kind of what a row shows, and its bytes."""
    kind = "video" if "video" in row else "image"
    return kind, row.get(kind) or b""


def batch(
    job: Job, rows: list[dict[str, Any]], engine: TorchEngine
) -> list[tuple[Columns, Completion]]:
    """What the stages of a job do, without Ray."""
    runner = TaskRunner(job, job.model)
    prompts = runner.prompts(rows)
    runner.close()
    found = []
    asked = [
        runner.asked(str(number), row, prompt)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]
    for each in asked:
        assert each.error is None
        engine.submit(each.requests)
    done: dict[str, Completion] = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    for each in asked:
        columns = runner.columns(each.note, [done[each.key]])
        assert columns["status"] == "ok"
        found.append((columns, done[each.key]))
    return found


def ask(replica: Replica, bodies: list[Body]) -> list[dict[str, Any]]:
    """All at once, as clients come."""

    async def together() -> list[dict[str, Any]]:
        return await asyncio.gather(*(replica.answer(body) for body in bodies))

    return asyncio.run(together())


def test_generated_tokens(replica: Replica, engine: TorchEngine) -> None:
    job = job_of("reply")
    rows = rows_of("support", job)
    bodies: list[Body] = [
        ChatRequest(
            model=MODEL, temperature=0.0, max_tokens=job.sampling.max_tokens, return_token_ids=True,
            messages=[
                {"role": "system", "content": job.task.system},
                {"role": "user", "content": (job.task.prompt or "").format(**row)},
            ],
        )
        for row in rows
    ]  # fmt: skip
    for (columns, completion), answer in zip(
        batch(job, rows, engine), ask(replica, bodies), strict=True
    ):
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == columns["text"]
        assert tuple(choice["token_ids"]) == completion.outputs[0].token_ids
        assert choice["finish_reason"] == columns["finish_reason"]
        assert answer["usage"]["prompt_tokens"] == columns["prompt_tokens"]


def test_extracted_json(replica: Replica, engine: TorchEngine) -> None:
    job = job_of("extract")
    rows = rows_of("support", job)
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": job.task.schema}}
    bodies: list[Body] = [
        ChatRequest.model_validate(
            {
                "model": MODEL, "temperature": 0.0, "max_tokens": job.sampling.max_tokens, "response_format": format_,
                "messages": [
                    {"role": "system", "content": job.task.system},
                    {"role": "user", "content": (job.task.prompt or "").format(**row)},
                ],
            }
        )
        for row in rows
    ]  # fmt: skip
    for (columns, _), answer in zip(batch(job, rows, engine), ask(replica, bodies), strict=True):
        assert answer["choices"][0]["message"]["content"].strip() == columns["json"]


@pytest.mark.parametrize(
    ("name", "folder"), [("route", "support"), ("shape", "shapes"), ("motion", "clips")]
)
def test_label_probabilities(replica: Replica, engine: TorchEngine, name: str, folder: str) -> None:
    job = job_of(name)
    rows = rows_of(folder, job)
    if folder == "support":
        bodies = [
            ScoreRequest(
                model=MODEL, system=job.task.system, labels=job.task.labels or [],
                prompt=(job.task.prompt or "").format(**row),
            )
            for row in rows
        ]  # fmt: skip
    else:
        bodies = [
            ScoreRequest(model=MODEL, messages=[_shown(row, job)], labels=job.task.labels or [])
            for row in rows
        ]
    for (columns, _), answer in zip(
        batch(job, rows, engine), ask(replica, list(bodies)), strict=True
    ):
        np.testing.assert_allclose(answer["label_probs"], columns["label_probs"], atol=1e-6)
        assert answer["label"] == columns["label"]
        assert answer["off_set_mass"] == pytest.approx(columns["off_set_mass"], abs=1e-6)
        assert answer["probability"] == max(answer["label_probs"])


def _shown(row: dict[str, Any], job: Job) -> dict[str, Any]:
    kind, data = _medium(row)
    part = {
        "type": f"{kind}_url",
        f"{kind}_url": {"url": f"data:{kind}/any;base64," + base64.b64encode(data).decode()},
    }
    return {"role": "user", "content": [part, {"type": "text", "text": job.task.prompt}]}


def test_vectors(replica: Replica, engine: TorchEngine) -> None:
    data = {"kind": "embed", "prompt": "{text}", "pooling": "mean"}
    job = _with_task(job_of("reply"), data)
    rows = rows_of("support", job)
    body = EmbeddingRequest(
        model=MODEL, input=[row["text"] for row in rows], pooling="mean", normalize=False
    )
    (answer,) = ask(replica, [body])
    for (columns, _), item in zip(batch(job, rows, engine), answer["data"], strict=True):
        np.testing.assert_allclose(item["embedding"], columns["vector"], atol=1e-5)


def _with_task(job: Job, task: dict[str, Any]) -> Job:
    return replace(job, task=TaskConfig(**task))


def test_classes(make_checkpoint: MakeCheckpoint) -> None:
    path = str(make_checkpoint("glm4", head="ForSequenceClassification"))
    texts = ["one text", "and another one"]
    job = replace(_with_task(job_of("reply"), {"kind": "classify", "prompt": "{text}"}), model=path)
    engine = TorchEngine.from_checkpoint(EngineConfig(model=path, kv_cache_tokens=1024))
    expected = batch(job, [{"text": text} for text in texts], engine)
    small = EngineOptions(kv_cache_tokens=1024)
    replica = Replica(ServedModel(model=path, engine=small), RequestLimits())
    (answer,) = ask(replica, [ClassifyRequest(model="c", input=texts)])
    replica.close()
    for (columns, _), item in zip(expected, answer["data"], strict=True):
        np.testing.assert_allclose(item["scores"], columns["scores"], atol=1e-6)
        assert item["label"] == columns["label"]
