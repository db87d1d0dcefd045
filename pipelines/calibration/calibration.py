"""A calibration as a file: what was fitted on gold answers, for which model, question and labels.

`glm-batch calibrate` writes it, `task.calibration` names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.job import TaskConfig

FORMAT = 1
# What the labels' probabilities depend on beside the row: for another question nothing was fitted.
QUESTION = ("kind", "system", "prompt", "messages", "image", "video", "end_of_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`bias` goes by label, in the order of `labels`; all 0 where a temperature alone was fitted.

    Measured on `rows` gold rows: expected calibration error and negative log-likelihood (nats a
    row) of the model's own probabilities, and of calibrated ones, each row's by a fit without it.
    `model` is the checkpoint's digest, `question` the task's keys in QUESTION. `left_out` counts
    rows that could not be used.
    """

    model: str
    question: Mapping[str, Any]
    labels: tuple[str, ...]
    temperature: float
    bias: tuple[float, ...]
    rows: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    left_out: Mapping[str, int] = field(default_factory=dict)
    fitted_on: str = ""

    @property
    def applied(self) -> dict[str, Any]:
        """What changes a job's output: it belongs to the job's identity."""
        return {
            "temperature": self.temperature,
            "bias": dict(zip(self.labels, self.bias, strict=True)),
        }

    def scaling(self, labels: Sequence[str]) -> Scaling:
        """For labels in this order."""
        return _scaling(self.applied, labels)

    def check(self, task: TaskConfig, labels: Sequence[str], model: str) -> None:
        """Raises ConfigError where it was fitted for another checkpoint, question or labels."""
        if model != self.model:
            raise ConfigError(
                f"task.calibration: it was fitted for another checkpoint (digest {self.model}, not "
                f"{model}); "
                "run glm-batch calibrate on an output of this one"
            )
        if set(labels) != set(self.labels):
            raise ConfigError(
                f"task.calibration: it was fitted for the labels {', '.join(self.labels)}, and the "
                "task has "
                f"{', '.join(labels)}; run glm-batch calibrate on an output with these"
            )
        asked = question_of(asdict(task))
        for name in QUESTION:
            if asked[name] != self.question[name]:
                there, here = (
                    json.dumps(each[name], ensure_ascii=False) for each in (self.question, asked)
                )
                raise ConfigError(
                    f"task.calibration: it was fitted with task.{name} {there}, and here it is "
                    f"{here}: what was fitted "
                    "on one question says nothing of another"
                )

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self)

    def sentence(self) -> str:
        """For people."""
        biases = ", ".join(
            f"{label} {bias:+.3f}" for label, bias in zip(self.labels, self.bias, strict=True)
        )
        shown = f", bias {biases}" if any(self.bias) else ""
        return (
            f"temperature {self.temperature:.4g}{shown}; calibration error {self.ece_before:.4f}, "
            "held out "
            f"{self.ece_after:.4f}; fitted on {self.rows:,} rows"
        )


def question_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task, given as a mapping, a calibration is fitted for, beside its labels."""
    kept: dict[str, Any] = json.loads(json.dumps({name: task.get(name) for name in QUESTION}))
    return kept


def read_calibration(path: str) -> Calibration:
    """Raises ConfigError, about task.calibration, for a file that is missing or none of ours."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"task.calibration: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(
            f"task.calibration: {path} is no JSON text ({error}); fit it with glm-batch calibrate"
        ) from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("it has another format")
        found = Calibration(**content | {name: tuple(content[name]) for name in ("labels", "bias")})
        numbers = (found.temperature, *found.bias)
        if not (all(math.isfinite(number) for number in numbers) and found.temperature > 0):
            raise ValueError("a temperature is above 0, and biases are finite")
        if set(found.question) != set(QUESTION):
            raise ValueError("its question lacks keys")
        if len(found.bias) != len(found.labels) or len(set(found.labels)) < len(found.labels):
            raise ValueError("each label has one bias")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"task.calibration: {path} is no calibration ({error}); fit one with glm-batch "
            "calibrate"
        ) from error
    return found


def planned_scaling(task: Mapping[str, Any], labels: Sequence[str]) -> Scaling | None:
    """What a planned job's task, as its identity holds it, applies to labels in this order."""
    applied = task.get("calibration")
    return None if applied is None else _scaling(applied, labels)


def _scaling(applied: Mapping[str, Any], labels: Sequence[str]) -> Scaling:
    bias = tuple(applied["bias"][label] for label in labels)
    return Scaling(temperature=applied["temperature"], bias=bias if any(bias) else ())
