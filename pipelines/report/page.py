"""The committed rows of an output become one HTML file that needs nothing else.

How it looks is the template's and style.css's. The page loads nothing: its policy allows its own
style and script by their digests, and images that stand in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY
from glm_batch.pipelines.metrics.counts import AFTER_ENGINE, BEFORE_ENGINE, Counts, bottleneck
from glm_batch.pipelines.output.parts import PARTS
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.answers import ENDS, LABELS
from glm_batch.pipelines.report.cards import Deck
from glm_batch.pipelines.report.charts import clean, compact, duration, percent, short
from glm_batch.pipelines.report.committed_rows import CommittedRows
from glm_batch.pipelines.report.input_rows import Place
from glm_batch.pipelines.report.quality import answers_section, gold_section, lengths_chart, wilson
from glm_batch.pipelines.report.timeline import Span

FILES_SHOWN = 20
SAMPLED, MISTAKES, UNSURE, OF_A_CODE = 12, 8, 6, 3  # rows
SUREST = "coalesce(CASE WHEN isfinite(confidence) THEN -confidence END, chance)"

ABOUT_CODES = {
    "aborted": "The request was ended before it was answered; retry it.",
    "bad_completion": "The completion merges with the end of the prompt, or is empty.",
    "bad_custom_id": "custom_id is no text, or an empty one.",
    "bad_gold": "The gold answer merges with the end of the prompt, so that its score is unknown.",
    "bad_image": "The bytes are no image that can be decoded.",
    "bad_json": "The input line is no JSON object.",
    "bad_messages": "The messages are none that the chat template takes.",
    "bad_video": "The bytes are no clip that can be decoded.",
    "constraint_failed": "The answer cannot be held to the schema: simplify it.",
    "decoder_crashed": "The decoder died of this file; it was started anew.",
    "duplicate_custom_id": "An earlier line has the same custom_id.",
    "duplicate_key": "An earlier row has the same key.",
    "empty_prompt": "The prompt has no tokens.",
    "empty_text": "The prompt's columns hold nothing but white space.",
    "generation_failed": "vLLM ended the answer early; retry it.",
    "gold_too_long": "Prompt and gold answer do not fit together: see engine.max_model_len.",
    "internal_error": "A fault of glm-batch itself; please report it.",
    "invalid_constraint": "The schema cannot be followed: simplify it.",
    "invalid_json": "The answer left the schema.",
    "invalid_media": "The patches of an image or video do not fit the checkpoint.",
    "invalid_text": "The text is not valid Unicode: repair it at its source.",
    "invalid_token": "A token id is outside of the vocabulary.",
    "media_aspect_ratio": "One side is far longer than the other: cut the image.",
    "media_fetch_failed": "A URL could not be fetched; it may work later.",
    "media_forbidden": "Its place is not allowed: see media.root and media.hosts.",
    "media_mismatch": "Prompt and media do not fit: placeholders and images are not as many.",
    "media_not_found": "The file is not there.",
    "media_timeout": "Fetching or decoding took too long; it may work later.",
    "media_too_large": "Larger than media.max_bytes or the decoder's limits.",
    "missing_column": "The row has no such column.",
    "missing_custom_id": "The line has no custom_id.",
    "no_token": "The schema and the sampling leave no token to choose.",
    "not_a_number": "A number of the prompt's columns is NaN or infinite.",
    "not_finite": "The model's output holds NaN or infinity: try engine.dtype float32.",
    "not_scored": "The scoring of a text was ended; retry it.",
    "not_utf8": "The text is not UTF-8.",
    "nothing_to_score": "A text of one token: it has nothing before it, after which to score it.",
    "null_key": "The key column is null.",
    "null_media": "The media column is null.",
    "null_prompt": "A column of the prompt is null.",
    "out_of_memory": "The engine ran out of memory on this row.",
    "output_truncated": "The JSON was cut off: raise sampling.max_tokens.",
    "prompt_too_long": "The prompt does not fit: see engine.max_model_len.",
    "refused": "vLLM refuses the request.",
    "template_error": "The chat template refuses the conversation.",
    "unreadable_input": "Damaged in the input file.",
    "unsupported_media": "The checkpoint reads text alone.",
    "unsupported_sampling": "The engine cannot sample like this: see engine.kind.",
    "unsupported_work": "The checkpoint or the engine cannot do this: see engine.kind.",
    "worker_died": "The process died of this row again and again: make it smaller or leave it out.",
    "wrong_shape": "The engine's numbers do not fit the checkpoint's head.",
    "wrong_type": "A column holds a type that does not fit there.",
}


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence on top of the page; `level` is info or warning."""

    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Tile:
    """A number with its name and a line of explanation."""

    name: str
    value: str
    note: str = ""
    level: str = ""


def render_job(rows: CommittedRows) -> str:
    """The page of one output."""
    chosen = {
        "sampled": rows.lowest("chance", SAMPLED),
        "mistakes": rows.lowest(SUREST, MISTAKES, "status = 'ok' AND accuracy <= 0"),
        "unsure": rows.lowest("margin", UNSURE),
    }
    failed = rows.failed(OF_A_CODE)
    places = [place for some in (*chosen.values(), *failed.values()) for place in some]
    deck = Deck(rows, places)
    counts, done = rows.totals.counts, rows.totals.counts.rows
    return render(
        "job.html.jinja",
        title=short(rows.output.place.rstrip("/").rpartition("/")[2], 80),
        place=rows.output.place,
        kind=rows.job.task.kind,
        model=rows.job.model,
        fingerprint=rows.plan.fingerprint,
        calibration=_calibration(rows.plan.identity),
        finished=rows.finished,
        done=done / rows.plan.num_rows if rows.plan.num_rows else 1.0,
        notes=list(_notes(rows)),
        tiles=list(_tiles(rows)),
        answers=answers_section(rows),
        gold=gold_section(rows.gold),
        errors=list(_errors(counts, failed, deck)),
        time=_time(rows),
        tokens=_tokens(counts, rows.frequencies("prompt_tokens")),
        cards={name: list(map(deck.card, some)) for name, some in chosen.items()},
        job_text=json.dumps(asdict(rows.job), indent=1, ensure_ascii=False, default=str),
        files=_files(rows),
        schema=[(field.name, str(field.type)) for field in rows.schema or ()],
    )


def _calibration(identity: Mapping[str, Any]) -> str | None:
    """What was applied to the probabilities on the page, for people."""
    applied = identity["task"].get("calibration")
    if applied is None:
        return None
    each = applied["bias"].items() if any(applied["bias"].values()) else ()
    biases = ", ".join(f"{short(label, 40)} {bias:+.3f}" for label, bias in each)
    return f"temperature {applied['temperature']:.4g}{', bias ' if biases else ''}{biases}"


def render(template: str, **context: Any) -> str:
    """A template with the page's style, script and policy; what is no markup of ours is escaped."""
    style, script = _asset("style.css"), _asset("sort.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    text = (
        _environment()
        .get_template(template)
        .render(policy=policy, style=Markup(style), script=Markup(script), made=made, **context)
    )
    return text.encode("utf-8", "replace").decode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("glm_batch.pipelines.report", "assets"),
        autoescape=True,
        finalize=clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "compact": compact}
    environment.globals["bar"] = charts.bar
    return environment


def _asset(name: str) -> str:
    return (
        resources.files("glm_batch.pipelines.report")
        .joinpath("assets", name)
        .read_text(encoding="utf-8")
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _errors(
    counts: Counts, failed: Mapping[str, Sequence[Place]], deck: Deck
) -> Iterator[dict[str, Any]]:
    highest = max(counts.errors.values(), default=1)
    for code, rows in sorted(counts.errors.items(), key=lambda item: (-item[1], item[0])):
        yield {
            "code": code,
            "rows": rows,
            "share": rows / counts.rows,
            "about": ABOUT_CODES.get(code, ""),
            "bar": charts.bar(rows / highest),
            "cards": list(map(deck.card, failed.get(code, ()))),
        }


def _time(rows: CommittedRows) -> dict[str, Any]:
    line = rows.totals.clock.timeline()
    facts = []
    if line.known:
        facts += [
            ("First unit began", clock(line.start)),
            ("Last commit", clock(line.end)),
            ("Time of work", duration(line.active_s)),
            ("Pauses", _in_all(line.pauses)),
            ("Stalls", _in_all(line.stalls)),
            ("A unit in the engine", f"{duration(line.unit_s)} (median)"),
        ]
    again, of = rows.again, f"of {rows.plan.num_units:,}, {rows.plan.unit_rows:,} rows each at most"
    facts += [
        ("Units", f"{rows.totals.parts:,} {of}"),
        ("Rows processed again", f"{again:,} in {line.retried_units:,} units" if again else "none"),
        *_stages(rows.totals.spent),
    ]
    pauses = [
        (line.active(start), f"paused {duration(stop - start)}") for start, stop in line.pauses
    ]
    stalls = [(line.active(start), line.active(stop)) for start, stop in line.stalls]
    chart = [
        charts.throughput(
            line.edges.tolist(), line.rates.tolist(), title="Rows per second over the time of work",
            mean=line.rows_per_s, pauses=pauses[:12], stalls=stalls, width=width,
        )
        for width in (860, 420)
        if line.known
    ]  # fmt: skip
    return {
        "facts": facts,
        "chart": chart,
        "unknown": line.unknown,
        "pauses": bool(line.pauses),
        "stalls": bool(line.stalls),
    }


def _in_all(spans: Sequence[Span]) -> str:
    total = duration(sum(stop - start for start, stop in spans))
    return f"{len(spans)}, {total} in all" if spans else "none"


def _stages(spent: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What the workers' seconds went into; nothing where they were not timed."""
    found = bottleneck(spent)
    if found is None:
        return
    yield (
        "Engine busy",
        f"{duration(spent.get(ENGINE_BUSY, 0.0))}, {percent(found.engine_share)} of its time",
    )
    for stage in (*BEFORE_ENGINE, *AFTER_ENGINE):
        if spent.get(stage):
            yield f"{stage.capitalize()}", f"{duration(spent[stage])} of workers' time"
    yield "Bottleneck", f"{found.stage}: {found.remedy}"


def _tokens(counts: Counts, prompt_lengths: Mapping[int, int]) -> dict[str, Any]:
    parts = [
        ("bar", "read by the model", counts.prompt_tokens - counts.cached_tokens),
        ("cached", "cached prompt", counts.cached_tokens),
        ("written", "written", counts.output_tokens),
    ]
    rows = max(counts.rows, 1)
    total = counts.prompt_tokens + counts.output_tokens
    return {
        "bar": charts.stacked_bar(
            [(name, value) for name, _, value in parts], "Tokens read, cached and written"
        ),
        "parts": [
            (name, told, value, value / total if total else 0.0, value / rows)
            for name, told, value in parts
        ],
        "media": counts.media_tokens,
        "media_share": counts.media_tokens / counts.prompt_tokens if counts.prompt_tokens else 0.0,
        "total": total,
        "prompts": lengths_chart(prompt_lengths, "Tokens of a prompt"),
    }


def _files(rows: CommittedRows) -> dict[str, Any]:
    files = rows.plan.files
    return {
        "shown": [(each.file.name, each.num_rows, each.file.size) for each in files[:FILES_SHOWN]],
        "more": max(len(files) - FILES_SHOWN, 0),
        "bytes": rows.totals.num_bytes,
    }


def _tiles(rows: CommittedRows) -> Iterator[Tile]:
    counts, line, gold = rows.totals.counts, rows.totals.clock.timeline(), rows.gold
    of = f"{counts.ok:,} answered" if rows.finished else f"of {rows.plan.num_rows:,} so far"
    yield Tile("Rows", f"{counts.rows:,}", of)
    failed, allowed = percent(counts.error_rate), percent(rows.job.max_error_rate)
    level = "bad" if counts.error_rate > rows.job.max_error_rate else ""
    yield Tile("Failed", f"{counts.error_rows:,}", f"{failed}, allowed {allowed}", level)
    if counts.accuracy is not None:
        low, high = wilson(counts.gold_correct, counts.gold_rows)
        sure = f"95 % interval {low * 100:.1f} to {high * 100:.1f}"
        note = f"{sure}; {counts.gold_rows:,} rows with gold"
        yield Tile("Accuracy", percent(counts.accuracy), note)
    if rows.confidence is not None:
        note = "of the answer given"
        if gold and gold.reliability:
            note = f"calibration error {gold.reliability.ece * 100:.1f} points"
        yield Tile("Mean confidence", percent(rows.confidence.mean), note)
    if line.rows_per_s:
        note = f"over {duration(line.active_s)} of work"
        yield Tile("Rows per second", compact(line.rows_per_s), note)
    total = counts.prompt_tokens + counts.output_tokens
    yield Tile("Tokens", compact(total), f"{percent(counts.cached_share)} of the prompts cached")


def _notes(rows: CommittedRows) -> Iterator[Note]:
    """What stands out, the gravest first."""
    counts, allowed = rows.totals.counts, rows.job.max_error_rate
    if not rows.finished:
        done = f"{rows.totals.parts:,} of {rows.plan.num_units:,} units"
        yield Note(
            f"The job is not finished: {done} are committed, and all numbers are theirs. "
            "The same label command goes on from there.",
            "warning",
        )
    if counts.error_rate > allowed:
        yield Note(
            f"{counts.error_rows:,} rows failed ({percent(counts.error_rate)}), and "
            f"max_error_rate allows {percent(allowed)}. What failed, and why, stands below; "
            "glm-batch retry processes these rows again.",
            "warning",
        )
    if rows.input_rows.problems:
        first = next(iter(rows.input_rows.problems.values()))
        yield Note(
            f"{len(rows.input_rows.problems):,} input files cannot be read any more, "
            f"so prompts, media and gold answers of their rows are missing here: {first}",
            "warning",
        )
    yield from _quality_notes(rows)
    for start, stop in rows.totals.clock.timeline().stalls[:3]:
        yield Note(
            f"Nothing was committed for {duration(stop - start)} from {clock(start)} on "
            "while units were in work.",
            "warning",
        )
    left = sum(len(page) for page in rows.output.store.pages(PARTS)) - rows.totals.parts
    if left > 0 and rows.finished:
        yield Note(
            f"{left:,} files of attempts that died, came second or were retried are left; "
            "glm-batch gc removes them."
        )


def _quality_notes(rows: CommittedRows) -> Iterator[Note]:
    gold, question, values = rows.gold, rows.question, rows.values
    reliability = gold.reliability if gold else None
    if gold and reliability and gold.bins[0].sum() >= 100 and reliability.ece > 0.05:
        num_rows, sure, right = gold.bins.sum(axis=1)
        how = "surer than it is right" if sure > right else "less sure than it could be"
        yield Note(
            f"The model is {how}: mean confidence {percent(sure / num_rows)}, accuracy "
            f"{percent(right / num_rows)} (calibration error {reliability.ece * 100:.1f} points).",
            "warning",
        )
    if rows.off_set_mass is not None and rows.off_set_mass.mean > 0.1:
        yield Note(
            f"On average {percent(rows.off_set_mass.mean)} of the probability goes to "
            "answers outside of the labels: the prompt may not tell which ones there are.",
            "warning",
        )
    if gold and gold.mistake and gold.mistake[2] >= 3:
        truth, given, number = gold.mistake
        pair = f"{short(truth, 40)} taken for {short(given, 40)}"
        yield Note(f"The most frequent mistake: {pair}, {number:,} rows.")
    if question.kind == "choose" and LABELS in values:
        never = [label for label in question.labels if label not in values[LABELS].counts]
        some = ", ".join(short(label, 30) for label in never[:8])
        if never:
            yield Note(f"Never given: {some}{' ...' if len(never) > 8 else ''}.")
    ends = values.get(ENDS)
    if ends is not None and (cut := ends.counts.get("length", 0)):
        share = percent(cut / ends.total)
        yield Note(f"{cut:,} texts ({share}) were cut off at sampling.max_tokens.", "warning")


def clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
