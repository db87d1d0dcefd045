"""A calibration: how it is fitted to gold answers, and the file that says for which model it holds.

`glm-batch calibrate` writes it, `task.calibration` names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import Scaling, softmax
from glm_batch.pipelines.evaluation.agreement import reliability
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


# nats for a factor or bias that is off by sqrt(2) of what changes nothing, against all rows
# together
PULL = 0.1
NUM_FOLDS = 5
MIN_ROWS = 20
MAX_STEPS = 100
LEAST_FACTOR = 1e-3

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """`before` and `after` are (expected calibration error, negative log-likelihood); see "
    "`fitted`."""

    scaling: Scaling
    before: tuple[float, float]
    after: tuple[float, float]


def fitted(logprobs: Floats, gold: Ints, labels: Sequence[str], *, with_bias: bool) -> Fit:
    """Fits on all rows; `after` is measured on each fifth of them with a fit on the other four.

    `logprobs` [rows, labels] may hold -inf, but not at `gold` [rows], the gold labels' numbers.
    Raises ConfigError for a sample that is too small, or on which a temperature cannot help.
    """
    _check(gold, labels, with_bias=with_bias)
    folds = np.random.default_rng(0).permutation(len(gold)) % NUM_FOLDS
    held_out = np.empty_like(logprobs)
    for fold in range(NUM_FOLDS):
        scaling = fit(logprobs[folds != fold], gold[folds != fold], with_bias=with_bias)
        held_out[folds == fold] = scaling.logits(logprobs[folds == fold])
    return Fit(
        scaling=fit(logprobs, gold, with_bias=with_bias),
        before=quality(logprobs, gold),
        after=quality(held_out, gold),
    )


def quality(logits: Floats, gold: Ints) -> tuple[float, float]:
    """(calibration error, mean negative log-likelihood in nats) of the softmax of logits."""
    right = (logits.argmax(axis=1) == gold).astype(np.float64)
    highest = logits.max(axis=1)
    totals = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    nll = float((totals - logits[np.arange(len(gold)), gold]).mean())
    return reliability(softmax(logits).max(axis=1), right).ece, nll


def fit(logprobs: Floats, gold: Ints, *, with_bias: bool) -> Scaling:
    """Raises ConfigError where the best temperature would not be positive."""
    logprobs = logprobs - logprobs.max(axis=1, keepdims=True)
    num_labels = logprobs.shape[1]
    neutral = np.array([1.0] + [0.0] * num_labels)
    free = np.arange(1 + num_labels * with_bias)
    point = neutral.copy()
    value, slope, curve = _objective(point, neutral, logprobs, gold)
    for _ in range(MAX_STEPS):
        step = np.zeros_like(point)
        step[free] = np.linalg.solve(curve[np.ix_(free, free)], -slope[free])
        if -(slope @ step) < 1e-12:
            break
        size = 1.0
        while True:
            tried = _objective(point + size * step, neutral, logprobs, gold)
            if tried[0] <= value + 1e-4 * size * (slope @ step) or size < 1e-10:
                break
            size /= 2
        point = point + size * step
        value, slope, curve = tried
    if point[0] < LEAST_FACTOR:
        raise ConfigError(
            "the model's probabilities say nothing about which label is right on this sample, or "
            "the contrary: no "
            "temperature can mend that; look at the accuracy first"
        )
    bias = point[1:] - point[1:].mean()
    return Scaling(temperature=float(1 / point[0]), bias=tuple(bias.tolist()) if with_bias else ())


def _objective(
    point: Floats, neutral: Floats, logprobs: Floats, gold: Ints
) -> tuple[float, Floats, Floats]:
    """(value, gradient, Hessian) of the negative log-likelihood and the pull at `point`."""
    num_rows, num_labels = logprobs.shape
    known = np.where(np.isfinite(logprobs), logprobs, 0.0)
    logits = np.where(np.isfinite(logprobs), point[0] * known + point[1:], -np.inf)
    highest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - highest)
    total = weights.sum(axis=1, keepdims=True)
    p = weights / total
    rows = np.arange(num_rows)
    mean = (p * known).sum(axis=1)
    off = p.copy()
    off[rows, gold] -= 1.0
    pull, away = PULL / num_rows, point - neutral
    value = float(
        (highest[:, 0] + np.log(total[:, 0]) - logits[rows, gold]).mean() + 0.5 * pull * away @ away
    )
    slope = np.concatenate([[(off * known).sum(axis=1).mean()], off.mean(axis=0)]) + pull * away
    curve = np.empty((1 + num_labels, 1 + num_labels))
    curve[0, 0] = ((p * known**2).sum(axis=1) - mean**2).mean()
    curve[0, 1:] = curve[1:, 0] = (p * (known - mean[:, None])).mean(axis=0)
    curve[1:, 1:] = np.diag(p.mean(axis=0)) - p.T @ p / num_rows
    return value, slope, curve + pull * np.eye(1 + num_labels)


def _check(gold: Ints, labels: Sequence[str], *, with_bias: bool) -> None:
    if len(gold) < MIN_ROWS:
        raise ConfigError(
            f"{len(gold):,} rows have a gold label and probabilities; a fit needs at least "
            f"{MIN_ROWS}"
        )
    if len(labels) < 2:
        raise ConfigError("there is one label: its probability is always 1")
    rows = np.bincount(gold, minlength=len(labels))
    if with_bias and rows.min() < NUM_FOLDS:
        raise ConfigError(
            f"{labels[int(rows.argmin())]!r} is the gold answer of {int(rows.min())} rows, and a "
            "bias for each label "
            f"needs {NUM_FOLDS} of each: take more rows, or leave out --bias"
        )
