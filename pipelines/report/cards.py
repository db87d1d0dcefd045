"""Rows as a person looks at them: what was asked, its pictures, what was answered, and whether that
is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_batch.models.errors import RowError
from glm_batch.models.processing.messages import MediaPart, media_parts
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.report.committed_rows import CommittedRows
from glm_batch.pipelines.report.input_rows import Place
from glm_batch.pipelines.report.text import shown
from glm_batch.pipelines.report.thumbnails import Picture, pictures
from glm_batch.pipelines.tasks.prompts import (
    Message,
    PromptTemplate,
    conversation,
    prompt_columns,
    uses_chat,
)
from glm_batch.pipelines.tasks.schema import ROW_COLUMNS
from glm_batch.pipelines.tasks.tasks import TOKEN_COLUMNS

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


class Deck:
    """Makes cards of an output's rows; what all of them need is read at once."""

    def __init__(self, rows: CommittedRows, places: Iterable[Place]) -> None:
        self.job, self.labels = rows.job, rows.question.labels
        self._rows = rows.picked(places)
        found = rows.input_rows.some(sorted(self._rows), asked_columns(self.job))
        self._asked = {place: asked(self.job, row) for place, row in found.items()}
        self._pictures: dict[Place, tuple[Picture, ...]] = {}
        wanted = [(place, part) for place, each in self._asked.items() for part in each.parts]
        made = pictures(self.job, [part for _, part in wanted]) if wanted else []
        for (place, _), picture in zip(wanted, made, strict=True):
            self._pictures[place] = (*self._pictures.get(place, ()), picture)

    def card(self, place: Place) -> Card:
        columns, accuracy = self._rows[place].columns, self._rows[place].accuracy
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
            answer="" if error else shown(answer_text(self.job, columns), ANSWER_SHOWN),
            details=() if error else tuple(_details(self.job.task.kind, columns)),
            scores=tuple(self._scores(columns)),
            gold=None if gold is None else shown(_text(gold), ANSWER_SHOWN),
            verdict="" if error or accuracy is None else "right" if accuracy > 0 else "wrong",
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


def asked_columns(job: Job) -> tuple[str, ...]:
    """The input columns of a prompt and its gold answer."""
    gold = job.task.gold
    return tuple(dict.fromkeys((*prompt_columns(job.task), *((gold,) if gold else ()))))


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


def row_text(job: Job, row: Row | RowError, most: int) -> str:
    """What a row says, without the words that are asked of every row; `most` characters a column."""
    names = prompt_columns(job.task)
    if isinstance(row, RowError) or job.task.messages is not None or not names:
        return shown(asked(job, row).prompt, most)
    return _cell(row.get(names[0]), most) if len(names) == 1 else _cells(job, row, most)


def answer_text(job: Job, columns: Mapping[str, Any]) -> str:
    """The answer of a good row as text."""
    kind: str = job.task.kind
    match kind:
        case "choose" | "classify":
            label = columns["label"]
            return ", ".join(label) or "(no label)" if isinstance(label, list) else str(label)
        case "generate":
            text = columns["text"]
            if not isinstance(text, list):
                return text or ""
            return "\n".join(f"{k}. {each}" for k, each in enumerate(text, 1))
        case "extract":
            return json.dumps(json.loads(columns["json"]), indent=1, ensure_ascii=False)
        case "tag":
            tokens = columns["tokens"]
            more = len(tokens) - TOKENS_SHOWN
            told = [f"{token['text'].strip()}/{token['label']}" for token in tokens[:TOKENS_SHOWN]]
            return "  ".join(told) + (f" ... {more:,} tokens more" if more > 0 else "")
        case "requests":
            return str(columns["response"])
        case "embed":
            vector = [f"{value:.3g}" for value in columns["vector"][:6]]
            return f"[{', '.join(vector)}{', ...' if len(columns['vector']) > 6 else ''}]"
    others = {*ROW_COLUMNS, *TOKEN_COLUMNS, *job.carry}
    return "\n".join(f"{name}: {_cell(columns[name])}" for name in columns if name not in others)


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


def _cells(job: Job, row: Row, most: int = PROMPT_SHOWN) -> str:
    """What the columns of a prompt hold."""
    cells = {name: row.get(name) for name in prompt_columns(job.task)}
    return "\n".join(f"{name}: {_cell(value, most)}" for name, value in cells.items())


def _cell(value: Any, most: int = PROMPT_SHOWN) -> str:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        return f"{len(value):,} bytes, beginning with {value[:12]!r}"
    return shown(_text(value), most)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
