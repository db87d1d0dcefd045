"""What was collected of an output becomes one HTML file that needs nothing else.

Owns the order of the sections and how a page is put together; how it looks is the template's and
style.css's. The page loads nothing: its policy allows its own style and script by their digests,
and images that stand in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY
from glm_batch.pipelines.metrics.bottleneck import AFTER_ENGINE, BEFORE_ENGINE, bottleneck
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.cards import Deck
from glm_batch.pipelines.report.collect import Collected
from glm_batch.pipelines.report.head import clock, notes, state, tiles
from glm_batch.pipelines.report.quality import answers_section, gold_section, lengths_chart
from glm_batch.pipelines.report.text import clean, compact, duration, percent, short

FILES_SHOWN = 20

ABOUT_CODES = {
    "aborted": "The request was ended before it was answered; retry it.",
    "bad_custom_id": "custom_id is no text, or an empty one.",
    "bad_gold": "The gold answer merges with the end of the prompt: task.gold_logprobs cannot score it.",
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
    "gold_too_long": "Prompt and gold answer do not fit together: see task.gold_logprobs and engine.max_model_len.",
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
    "not_scored": "The scoring of the gold answer was ended; retry it.",
    "not_utf8": "The text is not UTF-8.",
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
    "worker_died": "The process died of this row, again and again: make it smaller or leave it out.",
    "wrong_shape": "The engine's numbers do not fit the checkpoint's head.",
    "wrong_type": "A column holds a type that does not fit there.",
}


def render_job(collected: Collected) -> str:
    """The page of one output."""
    found = collected.found
    deck = Deck(collected.job, collected.plan, collected.input_rows, found.answers.labels)
    every = [found.sampled, found.mistakes, found.unsure, *found.failed.values()]
    deck.gather(row for chosen in every for row in chosen.rows)
    cards = {
        name: list(map(deck.card, getattr(found, name).rows))
        for name in ("sampled", "mistakes", "unsure")
    }
    return render(
        "job.html.jinja",
        title=short(collected.place.rstrip("/").rpartition("/")[2], 80),
        place=collected.place,
        kind=collected.job.task.kind,
        model=collected.job.model,
        fingerprint=collected.plan.fingerprint,
        calibration=_calibration(collected),
        state=state(collected),
        notes=list(notes(collected)),
        tiles=list(tiles(collected)),
        answers=answers_section(found.answers),
        gold=gold_section(found.answers),
        errors=list(_errors(collected, deck)),
        time=_time(collected),
        tokens=_tokens(collected),
        cards=cards,
        job_text=json.dumps(asdict(collected.job), indent=1, ensure_ascii=False, default=str),
        files=_files(collected),
        schema=[(field.name, str(field.type)) for field in found.schema or ()],
    )


def _calibration(collected: Collected) -> str | None:
    """What was applied to the probabilities on the page, for people."""
    applied = collected.plan.identity["task"].get("calibration")
    if applied is None:
        return None
    each = applied["bias"].items() if any(applied["bias"].values()) else ()
    biases = ", ".join(f"{short(label, 40)} {bias:+.3f}" for label, bias in each)
    return f"temperature {applied['temperature']:.4g}{', bias ' if biases else ''}{biases}"


def render(template: str, **context: Any) -> str:
    """A template with the page's style, script and policy. Everything in it that is no markup of
    ours is escaped.
    """
    style, script = _asset("style.css"), _asset("sort.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
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
    environment.filters |= {
        "percent": percent,
        "compact": compact,
        "duration": duration,
        "short": short,
    }
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


def _errors(collected: Collected, deck: Deck) -> Iterator[dict[str, Any]]:
    counts = collected.found.counts
    highest = max(counts.errors.values(), default=1)
    for code, rows in sorted(counts.errors.items(), key=lambda item: (-item[1], item[0])):
        chosen = collected.found.failed.get(code)
        yield {
            "code": code,
            "rows": rows,
            "share": rows / counts.rows,
            "about": ABOUT_CODES.get(code, ""),
            "bar": charts.bar(rows / highest),
            "cards": list(map(deck.card, chosen.rows)) if chosen else [],
        }


def _time(collected: Collected) -> dict[str, Any]:
    line, found = collected.timeline, collected.found
    facts = []
    if line.known:
        facts += [
            ("First unit began", clock(line.start)),
            ("Last commit", clock(line.end)),
            ("Time of work", duration(line.active_s)),
            (
                "Pauses",
                f"{len(line.pauses)}, {duration(sum(b - a for a, b in line.pauses))} in all"
                if line.pauses
                else "none",
            ),
            (
                "Stalls",
                f"{len(line.stalls)}, {duration(sum(b - a for a, b in line.stalls))} in all"
                if line.stalls
                else "none",
            ),
            ("A unit in the engine", f"{duration(line.unit_s)} (median)"),
        ]
    again = sum(rows for attempts, rows in found.attempts.items() if attempts > 1)
    facts += [
        (
            "Units",
            f"{found.parts:,} of {collected.plan.num_units:,}, {collected.plan.unit_rows:,} rows each at most",
        ),
        ("Rows processed again", f"{again:,} in {line.retried_units:,} units" if again else "none"),
        *_stages(found.spent),
    ]
    chart = None
    if line.known:
        pauses = [
            (line.active(start), f"paused {duration(stop - start)}") for start, stop in line.pauses
        ]
        stalls = [(line.active(start), line.active(stop)) for start, stop in line.stalls]
        chart = [
            charts.throughput(
                line.edges.tolist(),
                line.rates.tolist(),
                title="Rows per second over the time of work",
                mean=line.rows_per_s,
                pauses=pauses[:12],
                stalls=stalls,
                width=width,
            )
            for width in (860, 420)
        ]
    return {
        "facts": facts,
        "chart": chart,
        "unknown": line.unknown,
        "pauses": bool(line.pauses),
        "stalls": bool(line.stalls),
    }


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


def _tokens(collected: Collected) -> dict[str, Any]:
    counts = collected.found.counts
    read = counts.prompt_tokens - counts.cached_tokens
    parts = [
        ("bar", "read by the model", read),
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
        "prompts": lengths_chart(collected.found.prompt_lengths.counts, "Tokens of a prompt"),
    }


def _files(collected: Collected) -> dict[str, Any]:
    files = collected.plan.files
    shown_files = [(each.file.name, each.num_rows, each.file.size) for each in files[:FILES_SHOWN]]
    return {
        "shown": shown_files,
        "more": max(len(files) - FILES_SHOWN, 0),
        "bytes": collected.found.num_bytes,
    }
