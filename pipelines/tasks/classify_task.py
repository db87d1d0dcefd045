"""task.kind classify: scores and label of a checkpoint's classification head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Classify, Completion
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import class_scores
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns, Task, finite

SINGLE, SEVERAL = "single_label_classification", "multi_label_classification"


class ClassifyTask(Task):
    keys = ("calibration", "gold", "image", "video")
    head = "sequence_classification"
    engine_task = "classify"
    chats = False
    has_right_answer = True

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        label = {"regression": pa.float64(), SEVERAL: pa.list_(pa.string())}
        return {
            "scores": pa.list_(pa.float64()),
            "label": label.get(model.inferred_problem_type, pa.string()),
        }

    @staticmethod
    def checkpoint_problems(job: Job, model: ModelConfig) -> Iterator[str]:
        if model.inferred_problem_type != "regression":
            return
        file = Path(job.model) / "config.json"
        if model.num_labels > 1:
            yield (
                f"{file}: a regression with {model.num_labels} values is not supported, only with "
                "one"
            )
        elif job.task.gold is not None:
            yield (
                f"{file}: a regression has no right and wrong, so that accuracy cannot be told; "
                "remove task.gold"
            )

    def _work(self) -> Classify:
        return Classify()

    @property
    def labels(self) -> Sequence[str]:
        return self.model.id2label

    def _facts(self) -> dict[str, Any]:
        return {
            "problem_type": self.model.inferred_problem_type,
            "label_names": list(self.model.id2label),
        }

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        names = self.model.id2label
        scores, label = class_scores(
            finite(completions[0].array, (len(names),)),
            names,
            self.model.inferred_problem_type,
            self.scaling,
        )
        return {"scores": scores, "label": label}

    def is_right(self, columns: Columns, gold: object) -> bool:
        if self.model.inferred_problem_type == SEVERAL:
            golds = gold if isinstance(gold, list | tuple) else [gold]
            return set(columns["label"]) == {str(label) for label in golds}
        if self.model.inferred_problem_type != SINGLE:
            return super().is_right(columns, gold)
        return bool(columns["label"] == str(gold))

    def _read_calibration(self, path: str) -> Any:
        if self.model.inferred_problem_type != SINGLE:
            raise ConfigError(
                f"task.calibration: a {self.model.inferred_problem_type} has no probabilities that "
                "add up to 1; remove it"
            )
        return super()._read_calibration(path)
