"""What the rows of a part say, by kind of task: how sure, how right, which values to count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.pipelines.evaluation.agreement import bin_numbers
from glm_batch.pipelines.evaluation.scoring import Rules, score_rows
from glm_batch.pipelines.tasks.kinds import ROW_COLUMNS, TOKEN_COLUMNS

JUDGED = ("choose", "classify", "generate", "extract")  # kinds with one right answer
MAX_TEXT = 80  # a longer answer is counted as LONGER
LONGER = "(longer texts)"
SEED = 20
# Names of what is counted; those of values in an extracted object are the object's own.
LABELS, TEXTS, ENDS, FIELD = "Labels", "Most frequent texts", "Ended by", "Field "
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked: the kind of task, and labels in the order of their probabilities, if known.

    `carried` are output columns that hold no answer.
    """

    kind: str
    labels: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


def row_facts(
    question: Question, unit: int, part: pa.Table, golds: Sequence[Any] | None
) -> pa.Table:
    """One row for each of the part's, with what is known of it; null for what is not.

    `golds` are the rows' gold answers, None for a row without one. `chance` in [0, 1) depends on a
    row's place alone; `disagreement` is that of its samples. `accuracy`, above 0 if right, is there
    for rows with gold; `gold`, `answer`, `brier`, `bin` (of evaluation.agreement) for those whose
    answer has probabilities.
    """
    confidence, margin = sureness(question.kind, part)
    facts: dict[str, Any] = {
        "unit": np.full(part.num_rows, unit, np.int32),
        "row": np.arange(part.num_rows, dtype=np.int32),
        "status": part["status"],
        "code": part["error_code"],
        "attempts": part["attempts"],
        "prompt_tokens": part["prompt_tokens"],
        "length": _lengths(question.kind, part),
        "chance": np.random.default_rng([SEED, unit]).random(part.num_rows),
        "confidence": confidence,
        "margin": margin,
        "off_set_mass": part["off_set_mass"] if "off_set_mass" in part.column_names else None,
        "disagreement": _disagreements(question.kind, part),
        **_judged(question, part, golds),
    }
    columns = {name: _column(facts.get(name), FACTS.field(name).type, part) for name in FACTS.names}
    return pa.table(columns, FACTS)


FACTS = pa.schema(
    {
        "unit": pa.int32(), "row": pa.int32(), "status": pa.string(), "code": pa.string(),
        "attempts": pa.int32(), "prompt_tokens": pa.int32(), "length": pa.int32(),
        "chance": pa.float64(), "confidence": pa.float64(), "margin": pa.float64(),
        "off_set_mass": pa.float64(), "disagreement": pa.float64(),
        "accuracy": pa.float64(), "gold": pa.string(), "answer": pa.string(), "brier": pa.float64(),
        "bin": pa.int32(),
    }
)  # fmt: skip


def _column(values: Any, dtype: pa.DataType, part: pa.Table) -> pa.Array | pa.ChunkedArray:
    if values is None:
        return pa.nulls(part.num_rows, dtype)
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(dtype)
    return pa.array(values, dtype, from_pandas=True)


def _judged(question: Question, part: pa.Table, golds: Sequence[Any] | None) -> dict[str, Any]:
    """The answers against gold, by the rules that score all rows."""
    has_gold = np.array([gold is not None for gold in golds or ()], bool)
    if question.kind not in JUDGED or not has_gold.any():
        return {}
    places = np.flatnonzero(has_gold)
    rules = Rules(kind=question.kind, labels=_labels_of(question, part))
    assert golds is not None
    scored = score_rows(rules, part.take(pa.array(places)), [golds[row] for row in places.tolist()])
    found: dict[str, Any] = {"accuracy": np.full(part.num_rows, np.nan)}
    found["accuracy"][places] = scored.values["accuracy"]
    if "confidence" not in scored.values:
        return found
    confidence = scored.values["confidence"]
    bins = np.full(len(places), None, object)
    bins[np.isfinite(confidence)] = bin_numbers(confidence[np.isfinite(confidence)])
    own = {
        "gold": scored.gold,
        "answer": scored.answers,
        "brier": scored.values["brier"],
        "bin": bins,
    }
    for name, values in own.items():
        found[name] = np.full(part.num_rows, None, object)
        found[name][places] = values
    return found


def _labels_of(question: Question, part: pa.Table) -> tuple[str, ...]:
    """Numbers where the job does not tell the labels' names."""
    if question.labels or question.kind not in ("choose", "classify"):
        return question.labels
    scores = matrix(part["scores" if question.kind == "classify" else "label_probs"])
    return tuple(map(str, range(scores.shape[1])))


def _lengths(kind: str, part: pa.Table) -> pa.ChunkedArray | None:
    """How long an answer is, in the unit that quality.LENGTHS names; null for a row without one."""
    found = {"generate": "output_tokens", "tag": "tokens", "classify": "label"}.get(kind)
    if found is None or (kind == "classify" and not pa.types.is_list(part["label"].type)):
        return None
    lengths = part[found] if kind == "generate" else pc.list_value_length(part[found])
    return pc.if_else(pc.equal(part["status"], "ok"), lengths, None)


def _disagreements(kind: str, part: pa.Table) -> list[float | None] | None:
    if kind != "generate" or not pa.types.is_list(part["text"].type):
        return None
    return [None if texts is None else disagreement(texts) for texts in part["text"].to_pylist()]


def disagreement(answers: Sequence[Any]) -> float:
    """The share of answers that are not the most frequent one."""
    return 1 - max(Counter(answers).values()) / len(answers) if answers else 0.0


def counted_values(kind: str, part: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    """(what is counted, values) of a part's answered rows, for values of which there are few."""
    answered = part.filter(pc.equal(part["status"], "ok"))
    if kind == "choose" or (kind == "classify" and not pa.types.is_floating(part["label"].type)):
        yield LABELS, _flat(answered["label"])
    elif kind == "tag":
        yield "Tokens by label", _flat(answered["tokens"]).field("label")
    elif kind == "generate":
        text = _flat(answered["text"])
        yield TEXTS, pc.if_else(pc.greater(pc.utf8_length(text), MAX_TEXT), LONGER, text)
        yield ENDS, _flat(answered["finish_reason"])
    elif kind == "extract":
        fields: dict[str, list[str]] = {}
        for text in answered["json"].to_pylist():
            value = json.loads(text)
            for name, item in (
                value.items() if isinstance(value, dict) else [("(the whole value)", value)]
            ):
                told = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
                fields.setdefault(name, []).append(told if len(told) <= MAX_TEXT else LONGER)
        for name, values in fields.items():
            yield FIELD + name, pa.array(values)


def counted_numbers(question: Question, part: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """(name, numbers) of a part's answered rows; of an unknown kind all columns of numbers."""
    kind, others = question.kind, {*ROW_COLUMNS, *TOKEN_COLUMNS, *question.carried}
    answered = part.filter(pc.equal(part["status"], "ok"))
    if kind == "embed":
        yield (
            "Length of vectors",
            pa.chunked_array([np.linalg.norm(matrix(answered["vector"]), axis=1)]),
        )
    elif kind == "classify" and pa.types.is_floating(part["label"].type):
        yield "Values", answered["label"]
    elif kind not in (*JUDGED, "tag"):
        for field in part.schema:
            is_number = pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
            if is_number and field.name not in others:
                yield field.name, answered[field.name]


def sureness(kind: str, part: pa.Table) -> tuple[Floats, Floats]:
    """(confidence, margin) of each row, NaN where it has none.

    Confidence is the probability of the answer; the margin is how far it is ahead of the next one.
    Of several labels at once it is the distance of the nearest score from its threshold; of tags,
    the least sure token's score; of texts with log-probabilities, the geometric mean of the tokens'
    probabilities.
    """
    nothing = np.full(part.num_rows, np.nan)
    match kind:
        case "choose":
            return to_floats(part["probability"]), _lead(matrix(part["label_probs"]))
        case "classify" if pa.types.is_string(part["label"].type):
            scores = matrix(part["scores"])
            return scores.max(axis=1, initial=-np.inf) if scores.size else nothing, _lead(scores)
        case "classify" if pa.types.is_list(part["label"].type):
            scores = np.abs(matrix(part["scores"]) - 0.5)
            return nothing, scores.min(axis=1, initial=np.inf) * 2 if scores.size else nothing
        case "tag":
            least = np.array([_least(tokens) for tokens in part["tokens"].to_pylist()], np.float64)
            return least, least
        case "generate":
            every = part["logprobs"].to_pylist()
            mean = np.array([_mean_probability(values) for values in every], np.float64)
            return mean, mean
    return nothing, nothing


def matrix(column: pa.ChunkedArray) -> Floats:
    """A column of lists of equal length as [rows, length]; NaN for a null."""
    array = pa.chunked_array(column).combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    width = len(flat) // int(valid.sum()) if valid.any() else 0
    result = np.full((len(valid), width), np.nan)
    result[valid] = flat.reshape(-1, width) if width else 0.0
    return result


def to_floats(column: pa.ChunkedArray) -> Floats:
    """NaN for a null."""
    return np.asarray(column.to_numpy(), np.float64)


def label_names(
    kind: str, labels: Sequence[str] | None, facts: Mapping[str, Any]
) -> tuple[str, ...]:
    """The labels in the order of their probabilities, as far as job and manifest tell them."""
    return tuple(labels or ()) if kind == "choose" else tuple(facts.get("label_names", ()))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """The values of a column, or of its lists."""
    array = column.combine_chunks()
    return array.flatten() if pa.types.is_list(array.type) else array


def _lead(scores: Floats) -> Floats:
    """How far the highest of each row is ahead of the second."""
    if scores.shape[1] < 2:
        return np.full(len(scores), np.nan)
    top = np.sort(scores, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def _least(tokens: list[dict[str, Any]] | None) -> float:
    return min((token["score"] for token in tokens), default=np.nan) if tokens else np.nan


def _mean_probability(values: Any) -> float:
    if not values or values[0] is None or isinstance(values[0], list):
        return np.nan
    return float(np.exp(np.mean(values)))
