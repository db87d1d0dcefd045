"""lm_eval, unmodified, as a client: its accuracy is that of our own evaluation of the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine import EngineConfig
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns
from glm_batch.pipelines.tasks.task_runner import TaskRunner
from tests.glm_actors.serving.conftest import MODEL, TINY, TOKEN
from tests.glm_actors.serving.local import serving
from tests.glm_actors.serving.test_same_as_batch import batch, job_of, rows_of

Task = dict[str, Any]
Sample = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """What lm_eval found for one task."""

    accuracy: float
    samples: list[Sample]  # in the order of the rows


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    replica = Replica(
        ServedModel(model=TINY, engine=EngineOptions(dtype="float32", kv_cache_tokens=1 << 14)),
        RequestLimits(),
    )
    with serving({MODEL: replica}, RequestLimits()) as found:
        yield found
    replica.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    built = TorchEngine.from_checkpoint(
        EngineConfig(model=TINY, dtype="float32", kv_cache_tokens=1 << 14)
    )
    yield built
    built.close()


def tickets(job: Job, gold: str) -> list[dict[str, Any]]:
    """Rows of the shipped examples; every third has another's gold, so that no evaluation finds
    them all right.
    """
    rows = rows_of("support", job, 24)
    for row, other in zip(rows[::3], rows[1::3], strict=True):
        row[gold] = other[gold]
    return rows


def task_of(job: Job, folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Task:
    """A job as a task of lm_eval over the same rows."""
    data = folder / f"{job.task.kind}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = (job.task.prompt or "").replace("{text}", "{{text}}")
    return {
        "task": f"tickets_{job.task.kind}", "dataset_path": "json", "test_split": "test", "doc_to_text": prompt,
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "metadata": {"version": 1}, **fields,
    }  # fmt: skip


def lm_eval(
    kind: str, path: str, url: str, folder: Path, task: Task, *options: str, **model_args: Any
) -> Evaluated:
    """Runs its command line without a network."""
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True))
    arguments = {
        "model": MODEL,
        "base_url": url + path,
        "num_concurrent": 4,
        "max_retries": 1,
    } | model_args
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", task["task"], "--include_path", str(folder),
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()), "--log_samples",
        "--output_path", str(folder / "out"), "--apply_chat_template", *options,
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OPENAI_API_KEY": TOKEN,
        "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found = json.loads(results.read_text())["results"][task["task"]]
    accuracy = next(
        value for name, value in found.items() if name.split(",")[0] in ("acc", "exact_match")
    )
    rows = map(json.loads, samples.read_text().splitlines())
    return Evaluated(accuracy=accuracy, samples=sorted(rows, key=lambda sample: sample["doc_id"]))


def our_accuracy(job: Job, columns: list[Columns], rows: list[dict[str, Any]]) -> float:
    runner = TaskRunner(job, job.model)
    found = np.mean(
        [
            runner.is_right(column, row[job.task.gold])
            for column, row in zip(columns, rows, strict=True)
        ]
    )
    runner.close()
    return float(found)


def test_multiple_choice_over_completions(url: str, engine: TorchEngine, tmp_path: Path) -> None:
    """The log-probabilities of labels are those of kind choose."""
    job = job_of("route")
    rows = tickets(job, "gold_label")
    labels = job.task.labels or []
    task = task_of(
        job, tmp_path, rows, output_type="multiple_choice",
        # as the model writes them after its template
        doc_to_choice=[f"\n{label}" for label in labels],
        doc_to_target=f"{{{{{labels}.index(gold_label)}}}}",
    )  # fmt: skip
    found = lm_eval(
        "local-completions", "/v1/completions", url, tmp_path, task, "--system_instruction", job.task.system or "",
        "--batch_size", "8", tokenizer=TINY, tokenizer_backend="huggingface",
    )  # fmt: skip
    ours = batch(job, rows, engine)
    assert 0.5 < found.accuracy < 1.0
    assert found.accuracy == our_accuracy(job, [columns for columns, _ in ours], rows)
    for sample, (_, completion) in zip(found.samples, ours, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(theirs, completion.choice_logprobs or (), atol=1e-4)


def test_generation_over_chat(url: str, engine: TorchEngine, tmp_path: Path) -> None:
    job = job_of("reply")
    rows = tickets(job, "gold_reply")
    task = task_of(
        job, tmp_path, rows, output_type="generate_until", doc_to_target="{{gold_reply}}",
        generation_kwargs={"until": [], "max_gen_toks": job.sampling.max_tokens},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    found = lm_eval(
        "local-chat-completions", "/v1/chat/completions", url, tmp_path, task,
        "--system_instruction", job.task.system or "",
    )  # fmt: skip
    ours = [columns for columns, _ in batch(job, rows, engine)]
    assert [sample["resps"][0][0] for sample in found.samples] == [
        columns["text"] for columns in ours
    ]
    assert 0.3 < found.accuracy < 1.0
    assert found.accuracy == our_accuracy(job, ours, rows)
