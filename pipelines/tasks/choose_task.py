"""task.kind choose: one of several labels by its probability, without decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Choose, Completion
from glm_batch.models.processing.scores import label_scores
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns, Task


class ChooseTask(Task):
    keys = ("labels", "end_of_label", "label_logprobs", "calibration", "gold", "image", "video")
    engine_task = "choose"
    has_right_answer = True
    work: Choose

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        found = {
            "label": pa.string(),
            "probability": pa.float64(),
            "label_probs": pa.list_(pa.float64()),
            "off_set_mass": pa.float64(),
        }
        on_demand = {"label_logprobs": pa.list_(pa.float64())} if job.task.label_logprobs else {}
        return found | on_demand

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        labels = job.task.labels or []
        if not labels:
            yield "task.labels", "choose needs at least one label; write labels: [first, second]"
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            times = labels.count(label)
            yield "task.labels", f"the label {label!r} stands there {times} times; keep one"
        if any(not label.strip() for label in labels):
            yield "task.labels", "a label is empty; give each label some text"

    def _work(self) -> Choose:
        chat = self.prompter.chat
        choices = chat.label_continuations(list(self.labels), thinking=self.config.thinking)
        counts = chat.count_end(choices, self.config.end_of_label)
        return Choose(choices=tuple(choices), count_end=counts)

    @property
    def labels(self) -> Sequence[str]:
        return self.config.labels or ()

    @property
    def num_answer_tokens(self) -> int:
        return max(map(len, self.work.choices))

    def _facts(self) -> dict[str, Any]:
        return {
            "label_token_ids": [list(ids) for ids in self.work.choices],
            "end_counted": self.work.count_end,
        }

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        """Softmax over the labels' joint log-probabilities; off_set_mass is 1 - their sum."""
        logprobs = completions[0].choice_logprobs or ()
        found = label_scores(logprobs, self.scaling)
        columns: Columns = {
            "label": self.labels[found.best],
            "probability": found.probabilities[found.best],
            "label_probs": found.probabilities,
            "off_set_mass": found.off_set_mass,
        }
        return columns | ({"label_logprobs": list(logprobs)} if self.config.label_logprobs else {})

    def is_right(self, columns: Columns, gold: object) -> bool:
        return bool(columns["label"] == str(gold))
