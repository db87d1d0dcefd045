"""Runs a whole glm-batch job: Parquet rows in, rendered and tokenized by the pipeline, committed
Parquet out.

The counterpart of ray.data.llm: only the whole is measured. A label is scored as the template
writes it (a line break and the label), so its probabilities are not those of the systems that score
the label right after the prompt.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.systems.harness import Answer, FirstResult, Plan, run_system
from benchmarks.workload import OUTPUT_TOKENS, RowSet
from glm_batch.models.engine import SamplingParams
from glm_batch.pipelines.job import EngineSection, Job, TaskConfig
from glm_batch.pipelines.runs.pipeline import run


class PipelineSystem:
    first_result: FirstResult = "unknown"

    def __init__(self, plan: Plan) -> None:
        self._model_dir = plan.model_dir
        self._folder = Path(plan.row_files[0]).with_suffix(".job")
        self._engine = EngineSection(**{"kind": "torch", "dtype": "bfloat16", **plan.options})

    def run(self, rows: RowSet) -> Iterator[Answer]:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        names = [row.id for row in rows.rows]
        texts = [
            Path(row.text).read_bytes() if rows.work == "images" else row.text for row in rows.rows
        ]
        pq.write_table(pa.table({"id": names, "text": texts}), self._folder / "rows.parquet")
        wanted = len(rows.rows[0].input_ids)
        for part in run(self._job(rows)).iter_tables():
            for row in part.to_pylist():
                if row["status"] != "ok" or row["prompt_tokens"] != (
                    wanted or row["prompt_tokens"]
                ):
                    raise RuntimeError(
                        f"not the row that was asked for ({wanted} prompt tokens): {row}"
                    )
                yield _answer(rows, row)

    def _job(self, rows: RowSet) -> Job:
        generate, images = rows.work == "generate", rows.work == "images"
        task = TaskConfig(
            kind="generate" if generate else "choose",
            image="text" if images else None,
            prompt=rows.instruction if images else rows.instruction + "{text}",
            labels=None if generate else rows.labels,
        )
        return Job(
            model=self._model_dir,
            input=[str(self._folder / "rows.parquet")],
            output=str(self._folder / "out"),
            carry=["id"],
            task=task,
            sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=generate),
            engine=self._engine,
        )

    def settings(self) -> dict[str, Any]:
        import ray
        import torch

        return {"ray": ray.__version__, "torch": torch.__version__, **asdict(self._engine)}

    def close(self) -> None:
        """Nothing is held: Ray ended with the job."""


def _answer(rows: RowSet, row: dict[str, Any]) -> Answer:
    """The output has text, not ids: of a generated row only the number of tokens is handed on."""
    if rows.work != "generate":
        logprobs = [math.log(max(probability, 1e-300)) for probability in row["label_probs"]]
        return Answer(id=row["id"], logprobs=logprobs, cached_tokens=row["cached_tokens"])
    return Answer(
        id=row["id"], token_ids=[-1] * row["output_tokens"], cached_tokens=row["cached_tokens"]
    )


if __name__ == "__main__":
    run_system(lambda plan, rows: PipelineSystem(plan))
