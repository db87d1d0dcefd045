"""Rows as a person looks at them: prompt, pictures, answer, and whether that is right.

Pictures become small ones in data: URLs, decoded in the process that jobs use for hostile bytes and
under the job's own rules for paths. Nothing is fetched: a URL is only named.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.glm_actors.media.media_source import url_of
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.errors import ConfigError, EngineError, RowError
from glm_batch.models.processing.messages import MediaPart, media_parts
from glm_batch.models.processing.patches import Frame, MediaPatches
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.report.charts import shown
from glm_batch.pipelines.report.committed_rows import CommittedRows
from glm_batch.pipelines.report.input_rows import Place
from glm_batch.pipelines.tasks.job_media import media_rules
from glm_batch.pipelines.tasks.kinds import ROW_COLUMNS, TOKEN_COLUMNS, uses_chat
from glm_batch.pipelines.tasks.prompts import Message, PromptTemplate, conversation, prompt_columns

PROMPT_SHOWN, ANSWER_SHOWN, MESSAGE_SHOWN, KEY_SHOWN, TOKENS_SHOWN = 600, 600, 400, 120, 40
LABELS_SHOWN = 5
SIDE = 168
FRAMES = 4
PATCH = 8
JPEG_FROM = 96 * 96  # smaller pictures are drawings more often than not, and stay as they are
DECODE_S = 20.0
MAX_MEDIA = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image or clip: pictures as data: URLs with captions, or in `problem` why there is none."""

    kind: str
    frames: tuple[tuple[str, str], ...] = ()
    size: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A row. `scores` are (label, probability), highest first; `verdict` right, wrong or empty."""

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
    """What a row asked: prompt, media, gold answer; all empty where the input is gone."""

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
    """What a row says without the words asked of every row; `most` characters a column."""
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


def pictures(job: Job, parts: Sequence[MediaPart]) -> list[Picture]:
    """One for each part, in order. Only the first MAX_MEDIA are decoded; the others are named."""
    near = [place for place, part in enumerate(parts) if url_of(part.source) is None][:MAX_MEDIA]
    found = [Picture(kind=part.kind, problem=_named(part)) for part in parts]
    if not near:
        return found
    try:
        with closing(_loader(job)) as loader:
            results = loader.load([(parts[place].kind, parts[place].source) for place in near])
    except EngineError as error:
        return [replace(each, problem=str(error)) for each in found]
    for place, result in zip(near, results, strict=True):
        shown = _picture(result) if isinstance(result, MediaPatches) else None
        found[place] = shown or Picture(
            kind=parts[place].kind, problem=getattr(result, "message", "")
        )
    return found


def frames(media: MediaPatches) -> list[Frame]:
    """The pictures that patches of PATCH x PATCH were cut from: PatchWriter's order undone."""
    groups, height, width = media.grid
    cut = media.patches.reshape(groups, height, width, 3, -1, PATCH, PATCH)
    whole = cut.transpose(0, 4, 1, 5, 2, 6, 3)  # groups, frames, height, PATCH, width, PATCH, 3
    return list(np.ascontiguousarray(whole).reshape(-1, height * PATCH, width * PATCH, 3))


def _loader(job: Job) -> MediaLoader:
    """Patches as small as can be, so that pictures keep their shape; Pillow's filter, no torch."""
    image = ImageProcessorConfig(
        min_pixels=PATCH * PATCH,
        max_pixels=SIDE * SIDE,
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=1,
        resampling="pil",
    )
    own = {
        name: getattr(image, name)
        for name in ("min_pixels", "patch_size", "merge_size", "resampling")
    }
    fps = job.preprocess.fps or _checkpoint_fps(job.model)
    # All sampled frames share a budget; a long clip must not make its frames too small to see.
    video = VideoProcessorConfig(
        **own, temporal_patch_size=2, max_pixels=SIDE * SIDE * 200, fps=fps
    )
    rules = replace(media_rules(job), hosts=(), private_hosts=(), decode_timeout_s=DECODE_S)
    return MediaLoader(rules, image, video)


def _checkpoint_fps(model_dir: str) -> float:
    try:
        return VideoProcessorConfig.from_dir(model_dir).fps
    except (ConfigError, OSError):
        return VideoProcessorConfig().fps


def _picture(media: MediaPatches) -> Picture:
    _, height, width = media.source
    if media.kind == "image":
        return Picture(
            kind="image", frames=((_data_url(frames(media)[0]), ""),), size=f"{width} x {height}"
        )
    # the first frame of each group has a time
    shown = [_data_url(frame) for frame in frames(media)[::2][:FRAMES]]
    times = [f"{second:.1f} s" for second in media.timestamps[:FRAMES]]
    of_all = (
        f", first {len(shown)} of {media.source[0]} frames taken"
        if media.source[0] > len(shown)
        else ""
    )
    return Picture(
        kind="video",
        frames=tuple(zip(shown, times, strict=True)),
        size=f"{width} x {height}{of_all}",
    )


def _data_url(frame: Frame) -> str:
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE))
    kind = "png" if image.width * image.height < JPEG_FROM else "jpeg"
    stream = io.BytesIO()
    image.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _named(part: MediaPart) -> str:
    url = url_of(part.source)
    return (
        f"not fetched: {url.partition('?')[0]}"
        if url
        else "not decoded: there are many media on this page"
    )
