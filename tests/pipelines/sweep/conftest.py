"""A small sweep over pictures and texts, on the shipped checkpoint with the echo engine: its
answers are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.pipelines.job import CommitSection, EngineSection, Job, PreprocessSection, TaskConfig
from glm_batch.pipelines.sweep.cells import AXES, Cell, Sweep

EXAMPLES = Path(__file__).parents[3] / "examples"
SHAPES = ["circle", "square", "triangle", "star"]
NUM_ROWS = 23


def cell(
    sweep_output: str,
    name: str,
    dataset: str,
    files: Sequence[str],
    task: TaskConfig,
    **changes: Any,
) -> Cell:
    job = Job(
        model=str(EXAMPLES / "tiny_glm"),
        input=list(files),
        output=f"{sweep_output}/cells/{name}",
        key="id",
        task=task,
        engine=EngineSection(kind="echo"),
        commit=CommitSection(unit_rows=5),
        max_error_rate=1.0,
    )
    coordinates = dict.fromkeys(AXES, "default") | {
        "dataset": dataset,
        "task": name.partition("-")[0],
        "prompt": name,
    }
    return Cell(name=name, coordinates=coordinates, job=replace(job, **changes))


def make_sweep(folder: Path) -> Sweep:
    """Four cells of pictures (two prompts, two budgets) and three of texts (two of one prompt)."""
    output = str(folder / "out")
    pictures, texts = str(folder / "pictures.parquet"), str(folder / "texts.parquet")
    shape = TaskConfig(
        kind="choose", image="image", labels=SHAPES, gold="gold_shape", label_logprobs=True
    )
    cells = [
        cell(
            output, f"shape-{words}-{pixels}", "pictures", [pictures], replace(shape, prompt=prompt),
            preprocess=PreprocessSection(max_pixels=pixels),
        )
        for words, prompt in (("short", "Which shape?"), ("long", "Which of these shapes is in the picture?"))
        for pixels in (7056, 14112)
    ]  # fmt: skip
    team = TaskConfig(
        kind="choose", prompt="Team? {text}", labels=["billing", "other"], gold="gold_label"
    )
    reply = TaskConfig(kind="generate", prompt="Answer: {text}", gold="gold_reply")
    cells += [
        cell(output, "team", "texts", [texts], team),
        cell(output, "reply-one", "texts", [texts], reply, sampling=SamplingParams(max_tokens=4)),
        cell(
            output, "reply-three", "texts", [texts], replace(reply, gold_logprobs=True),
            sampling=SamplingParams(max_tokens=6, n=3),
        ),
    ]  # fmt: skip
    return Sweep(output=output, cells=tuple(cells))


def write_input(folder: Path) -> None:
    """The shards' first rows, a broken picture and a doubled key among them."""
    pictures = (
        pq.read_table(EXAMPLES / "shapes" / "shapes-1.parquet").slice(0, NUM_ROWS).to_pylist()
    )
    pictures[7]["image"] = b"no picture"
    pictures[11]["id"] = pictures[3]["id"]
    pq.write_table(pa.Table.from_pylist(pictures), folder / "pictures.parquet", row_group_size=10)
    texts = pq.read_table(EXAMPLES / "support" / "tickets-1.parquet").slice(0, NUM_ROWS)
    pq.write_table(texts, folder / "texts.parquet")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    write_input(tmp_path)
    return make_sweep(tmp_path)
