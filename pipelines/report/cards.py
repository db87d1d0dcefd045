"""Rows as a person looks at them: what was asked, its pictures, what was answered, and whether that
is right.

Reads the input rows behind the chosen output rows, once for the whole page. Knows nothing of HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glm_batch.models.errors import RowError
from glm_batch.models.processing.messages import MediaPart, media_parts
from glm_batch.pipelines.evaluation.scoring import Rules
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report.answers import JUDGED
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.tallies import Picked
from glm_batch.pipelines.report.text import shown
from glm_batch.pipelines.report.thumbnails import Picture, pictures
from glm_batch.pipelines.tasks.prompts import (
    Message,
    PromptTemplate,
    conversation,
    prompt_columns,
    uses_chat,
)

PROMPT_SHOWN, ANSWER_SHOWN, MESSAGE_SHOWN, KEY_SHOWN, TOKENS_SHOWN = 600, 600, 400, 120, 40
LABELS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One row on the page. `scores` are (label, probability), the highest first; `verdict` is
    right, wrong or empty.
    """

    key: str
    prompt: str
    pictures: tuple[Picture, ...]
    answer: str
    details: tuple[tuple[str, str], ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    gold: str | None = None
    verdict: str = ""
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asked: its prompt as text, its media, its gold answer; all empty where the input
    is gone.
    """

    prompt: str = ""
    parts: tuple[MediaPart, ...] = ()
    gold: Any = None


@dataclass(slots=True)
class Deck:
    """Makes cards of rows. `gather` reads what all of them need at once; then `card` knows it."""

    job: Job
    plan: Plan
    input_rows: InputRows
    labels: tuple[str, ...]
    _asked: dict[Place, Asked] = field(default_factory=dict)
    _pictures: dict[Place, tuple[Picture, ...]] = field(default_factory=dict)

    def gather(self, rows: Iterable[Picked]) -> None:
        places = sorted({(row.unit, row.row) for row in rows})
        gold = self.job.task.gold
        columns = tuple(dict.fromkeys((*prompt_columns(self.job.task), *((gold,) if gold else ()))))
        found = self.input_rows.some(places, columns)
        self._asked = {place: asked(self.job, row) for place, row in found.items()}
        wanted = [(place, part) for place, each in self._asked.items() for part in each.parts]
        made = pictures(self.job, [part for _, part in wanted]) if wanted else []
        for (place, _), picture in zip(wanted, made, strict=True):
            self._pictures[place] = (*self._pictures.get(place, ()), picture)

    def card(self, row: Picked) -> Card:
        place, columns = (row.unit, row.row), row.columns
        known = self._asked.get(place, Asked())
        gold = known.gold if known.gold is not None else columns.get(self.job.task.gold or "")
        error = None
        if columns["status"] != "ok":
            error = (
                columns["error_code"] or columns["status"],
                shown(columns["error_message"] or "", MESSAGE_SHOWN),
            )
        return Card(
            key=shown(str(columns["row_key"]), KEY_SHOWN),
            prompt=shown(known.prompt, PROMPT_SHOWN),
            pictures=self._pictures.get(place, ()),
            answer=shown(answer_text(self.job.task.kind, columns), ANSWER_SHOWN)
            if error is None
            else "",
            details=tuple(_details(self.job.task.kind, columns)) if error is None else (),
            scores=tuple(self._scores(columns)),
            gold=None
            if gold is None
            else shown(gold if isinstance(gold, str) else _json(gold), ANSWER_SHOWN),
            verdict=self._verdict(columns, gold) if error is None else "",
            error=error,
        )

    def _scores(self, columns: Mapping[str, Any]) -> list[tuple[str, float]]:
        scores = columns.get("label_probs") or columns.get("scores")
        if not scores or (columns.get("scores") and isinstance(columns.get("label"), float)):
            return []
        labels = (
            self.labels if len(self.labels) == len(scores) else tuple(map(str, range(len(scores))))
        )
        ranked = sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])
        return [(shown(label, KEY_SHOWN), score) for label, score in ranked[:LABELS_SHOWN]]

    def _verdict(self, columns: Mapping[str, Any], gold: Any) -> str:
        if gold is None or self.job.task.kind not in JUDGED:
            return ""
        return "right" if is_right(self.job.task.kind, self.labels, columns, gold) else "wrong"


def is_right(kind: str, labels: Sequence[str], columns: Mapping[str, Any], gold: Any) -> bool:
    """Whether one row's answer agrees with its gold answer, by the rule that scores all rows."""
    import pyarrow as pa

    from glm_batch.pipelines.evaluation.scoring import score_rows

    width = len(columns.get("label_probs") or columns.get("scores") or ())
    names = tuple(labels) if len(labels) == width else tuple(map(str, range(width)))
    kept = ("row_key", "status", "label", "label_probs", "off_set_mass", "scores", "text", "json")
    table = pa.table({name: [columns[name]] for name in kept if name in columns})
    return bool(score_rows(Rules(kind=kind, labels=names), table, [gold]).values["accuracy"][0] > 0)


def asked(job: Job, row: Row | RowError) -> Asked:
    """The prompt that a row makes, as far as it makes one."""
    if isinstance(row, RowError):
        return Asked()
    gold = row.get(job.task.gold) if job.task.gold else None
    if job.asks_by_row:
        return Asked(prompt=_json(row))
    try:
        template = PromptTemplate.parse(job.task.prompt) if job.task.prompt is not None else None
        if not uses_chat(job.task):
            assert template is not None
            return Asked(prompt=template.format(row), gold=gold)
        messages = conversation(job.task, template, row)
        return Asked(prompt=_transcript(messages), parts=tuple(media_parts(messages)), gold=gold)
    except RowError:
        return Asked(prompt=_cells(job, row), gold=gold)


def answer_text(kind: str, columns: Mapping[str, Any]) -> str:
    """The answer of a good row as text."""
    match kind:
        case "choose" | "classify":
            label = columns["label"]
            return ", ".join(label) or "(no label)" if isinstance(label, list) else str(label)
        case "generate":
            text = columns["text"]
            return (
                "\n".join(f"{k}. {each}" for k, each in enumerate(text, 1))
                if isinstance(text, list)
                else text or ""
            )
        case "extract":
            return json.dumps(json.loads(columns["json"]), indent=1, ensure_ascii=False)
        case "tag":
            tokens = columns["tokens"]
            more = (
                f" ... {len(tokens) - TOKENS_SHOWN:,} tokens more"
                if len(tokens) > TOKENS_SHOWN
                else ""
            )
            return (
                "  ".join(
                    f"{token['text'].strip()}/{token['label']}" for token in tokens[:TOKENS_SHOWN]
                )
                + more
            )
        case "requests":
            return str(columns["response"])
    vector = columns["vector"]
    return (
        f"[{', '.join(f'{value:.3g}' for value in vector[:6])}{', ...' if len(vector) > 6 else ''}]"
    )


def _details(kind: str, columns: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if columns.get("off_set_mass") is not None:
        yield "off_set_mass", f"{columns['off_set_mass']:.3g}"
    if kind == "embed":
        vector = columns["vector"]
        yield "length", f"{np.linalg.norm(vector):.4g} in {len(vector):,} dimensions"
    if isinstance(columns.get("finish_reason"), str):
        yield "ended by", columns["finish_reason"]
    if isinstance(columns.get("reasoning"), str) and columns["reasoning"]:
        yield "reasoning", shown(columns["reasoning"], ANSWER_SHOWN)
    if columns.get("attempts", 1) > 1:
        yield "attempts", str(columns["attempts"])
    yield "tokens", _tokens(columns)


def _tokens(columns: Mapping[str, Any]) -> str:
    told = (
        f"{columns['prompt_tokens'] or 0:,} read, {columns['cached_tokens'] or 0:,} of them cached"
    )
    return told + (f", {columns['output_tokens']:,} written" if columns["output_tokens"] else "")


def _transcript(messages: Sequence[Message]) -> str:
    """The conversation without its media; roles stand before what is not the only message."""
    texts = [
        (str(message.get("role", "")), _message_text(message.get("content")))
        for message in messages
    ]
    texts = [(role, text) for role, text in texts if text]
    asked_alone = len([role for role, _ in texts if role != "system"]) == 1
    if asked_alone:
        return next(text for role, text in texts if role != "system")
    return "\n\n".join(f"{role}: {text}" for role, text in texts)


def _message_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    pieces = content if isinstance(content, list) else []
    return "\n".join(
        str(piece.get("text", ""))
        for piece in pieces
        if isinstance(piece, dict) and "text" in piece
    )


def _cells(job: Job, row: Row) -> str:
    """What the columns of a prompt hold that could not be made."""
    cells = {name: row.get(name) for name in prompt_columns(job.task)}
    return "\n".join(f"{name}: {_cell(value)}" for name, value in cells.items())


def _cell(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        return f"{len(value):,} bytes, beginning with {value[:12]!r}"
    return (
        shown(value, PROMPT_SHOWN) if isinstance(value, str) else shown(_json(value), PROMPT_SHOWN)
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
