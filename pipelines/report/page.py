"""What was collected of an output becomes one HTML file that needs nothing else.

Owns which sections there are, their numbers and their words; how they look is the template's and style.css's. The page
loads nothing: its policy allows its own style and script by their digests, and images that stand in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.evaluation.classes import RESAMPLED
from pipelines.report import charts
from pipelines.report.answers import NO_ANSWER, Answers, Gold
from pipelines.report.cards import Card, Deck
from pipelines.report.collect import Collected
from pipelines.report.tallies import NumberRange, UnitHistogram, Values
from pipelines.report.text import clean, compact, duration, percent, short, shown

LABELS_SHOWN = 20
VALUES_SHOWN = 10
FILES_SHOWN = 20
BARS = 24
NARROW_MATRIX = 5  # columns of a confusion matrix that fit into half of the page
Z = 1.959964  # of a two-sided interval of 95 %

METRICS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}
ABOUT_CODES = {
    "aborted": "The request was ended before it was answered; retry it.",
    "bad_image": "The bytes are no image that can be decoded.",
    "bad_json": "The input line is no JSON object.",
    "bad_video": "The bytes are no clip that can be decoded.",
    "duplicate_key": "An earlier row has the same key.",
    "empty_text": "The prompt's columns hold nothing but white space.",
    "invalid_json": "The answer left the schema.",
    "media_fetch_failed": "A URL could not be fetched; it may work later.",
    "media_forbidden": "Its place is not allowed: see media.root and media.hosts.",
    "media_not_found": "The file is not there.",
    "media_timeout": "Fetching or decoding took too long; it may work later.",
    "media_too_large": "Larger than media.max_bytes or the decoder's limits.",
    "not_finite": "The model's output holds NaN or infinity: try engine.dtype float32.",
    "not_utf8": "The text is not UTF-8.",
    "null_key": "The key column is null.",
    "null_media": "The media column is null.",
    "null_prompt": "A column of the prompt is null.",
    "out_of_memory": "The engine ran out of memory on this row.",
    "output_truncated": "The JSON was cut off: raise sampling.max_tokens.",
    "prompt_too_long": "The prompt does not fit: see engine.max_model_len.",
    "unreadable_input": "Damaged in the input file.",
    "wrong_type": "A column holds a type that does not fit there.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence on top of the page; `level` is info or warning."""

    level: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number with its name and a line of explanation."""

    name: str
    value: str
    note: str = ""
    level: str = ""


def render_job(collected: Collected) -> str:
    """The page of one output."""
    found = collected.found
    deck = Deck(collected.job, collected.plan, collected.input_rows, found.answers.labels)
    every = [found.sampled, found.mistakes, found.unsure, *found.failed.values()]
    deck.gather(row for chosen in every for row in chosen.rows)
    cards = {name: list(map(deck.card, getattr(found, name).rows)) for name in ("sampled", "mistakes", "unsure")}
    return render(
        "job.html.jinja",
        title=short(collected.place.rstrip("/").rpartition("/")[2], 80),
        place=collected.place,
        kind=collected.job.task.kind,
        model=collected.job.model,
        fingerprint=collected.plan.fingerprint,
        state=_state(collected),
        notes=list(_notes(collected)),
        tiles=list(_tiles(collected)),
        answers=_answers(found.answers),
        gold=_gold(found.answers),
        errors=list(_errors(collected, deck)),
        time=_time(collected),
        tokens=_tokens(collected),
        cards=cards,
        job_text=json.dumps(asdict(collected.job), indent=1, ensure_ascii=False, default=str),
        files=_files(collected),
        schema=[(field.name, str(field.type)) for field in found.schema or ()],
    )


def render(template: str, **context: Any) -> str:
    """A template with the page's style, script and policy. Everything in it that is no markup of ours is escaped."""
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
        loader=jinja2.PackageLoader("pipelines.report", "assets"),
        autoescape=True,
        finalize=clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "compact": compact, "duration": duration, "short": short}
    environment.globals["bar"] = charts.bar
    return environment


def _asset(name: str) -> str:
    return resources.files("pipelines.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- the head


def _state(collected: Collected) -> dict[str, Any]:
    done, planned = collected.found.counts.rows, collected.plan.num_rows
    return {"finished": collected.finished, "share": done / planned if planned else 1.0, "rows": done, "of": planned}


def _tiles(collected: Collected) -> Iterator[Tile]:
    counts, answers, line = collected.found.counts, collected.found.answers, collected.timeline
    of = "" if collected.finished else f"of {collected.plan.num_rows:,} so far"
    yield Tile(name="Rows", value=f"{counts.rows:,}", note=of or f"{counts.ok:,} answered")
    failed = counts.error_rate > collected.job.max_error_rate
    yield Tile(
        name="Failed",
        value=f"{counts.error_rows:,}",
        note=f"{percent(counts.error_rate)}, allowed {percent(collected.job.max_error_rate)}",
        level="bad" if failed else "",
    )
    if counts.accuracy is not None:
        low, high = wilson(counts.gold_correct, counts.gold_rows)
        yield Tile(
            name="Accuracy",
            value=percent(counts.accuracy),
            note=f"95 % interval {low * 100:.1f} to {high * 100:.1f}; {counts.gold_rows:,} rows with gold",
        )
    if answers.confidence.rows:
        ece = answers.gold.reliability.ece if answers.gold and answers.gold.reliability else None
        note = f"calibration error {ece * 100:.1f} points" if ece is not None else "of the answer given"
        yield Tile(name="Mean confidence", value=percent(answers.confidence.mean), note=note)
    if line.rows_per_s:
        yield Tile(
            name="Rows per second", value=compact(line.rows_per_s), note=f"over {duration(line.active_s)} of work"
        )
    total = counts.prompt_tokens + counts.output_tokens
    yield Tile(name="Tokens", value=compact(total), note=f"{percent(counts.cached_share)} of the prompts cached")


def _notes(collected: Collected) -> Iterator[Note]:
    """What stands out, the gravest first."""
    counts, answers, job = collected.found.counts, collected.found.answers, collected.job
    if not collected.finished:
        done = f"{collected.found.parts:,} of {collected.plan.num_units:,} units"
        yield Note(
            level="warning",
            text=f"The job is not finished: {done} are committed, and all numbers are theirs. "
            "The same label command goes on from there.",
        )
    if counts.error_rate > job.max_error_rate:
        yield Note(
            level="warning",
            text=f"{counts.error_rows:,} rows failed ({percent(counts.error_rate)}), and "
            f"max_error_rate allows {percent(job.max_error_rate)}. What failed, and why, stands below; "
            "glm-batch retry processes these rows again.",
        )
    if collected.input_rows.problems:
        first = next(iter(collected.input_rows.problems.values()))
        yield Note(
            level="warning",
            text=f"{len(collected.input_rows.problems):,} input files cannot be read any more, "
            f"so prompts, media and gold answers of their rows are missing here: {first}",
        )
    yield from _quality_notes(answers)
    for start, stop in collected.timeline.stalls[:3]:
        yield Note(
            level="warning",
            text=f"Nothing was committed for {duration(stop - start)} from {_clock(start)} on "
            "while units were in work.",
        )
    if collected.left_parts > 0 and collected.finished:
        yield Note(
            level="info",
            text=f"{collected.left_parts:,} files of attempts that died, came second or were "
            "retried are left; glm-batch gc removes them.",
        )


def _quality_notes(answers: Answers) -> Iterator[Note]:
    gold = answers.gold
    if gold is not None and gold.reliability is not None and gold.bins[0].sum() >= 100 and gold.reliability.ece > 0.05:
        rows, sure, right = gold.bins.sum(axis=1)
        how = "surer than it is right" if sure > right else "less sure than it could be"
        yield Note(
            level="warning",
            text=f"The model is {how}: mean confidence {percent(sure / rows)}, accuracy "
            f"{percent(right / rows)} (calibration error {gold.reliability.ece * 100:.1f} points).",
        )
    if answers.off_set_mass.mean > 0.1:
        yield Note(
            level="warning",
            text=f"On average {percent(answers.off_set_mass.mean)} of the probability goes to "
            "answers outside of the labels: the prompt may not tell which ones there are.",
        )
    if gold is not None:
        wrong = [(pair, rows) for pair, rows in gold.pairs.items() if pair[0] != pair[1] and pair[1] != NO_ANSWER]
        if wrong:
            (truth, given), rows = max(wrong, key=lambda item: (item[1], item[0]))
            if rows >= 3:
                yield Note(
                    level="info",
                    text=f"The most frequent mistake: {short(truth, 40)} taken for {short(given, 40)}, {rows:,} rows.",
                )
    never = (
        [label for label in answers.labels if label not in answers.values.counts] if answers.kind == "choose" else []
    )
    if never and answers.values.total:
        yield Note(
            level="info",
            text=f"Never given: {', '.join(short(label, 30) for label in never[:8])}"
            f"{' ...' if len(never) > 8 else ''}.",
        )
    cut = answers.finished.counts.get("length", 0)
    if cut:
        yield Note(
            level="warning",
            text=f"{cut:,} texts ({percent(cut / answers.finished.total)}) were cut off at sampling.max_tokens.",
        )


# ---- answers


def _answers(answers: Answers) -> dict[str, Any]:
    gold_counts: Mapping[str, int] = {}
    if answers.gold is not None and answers.gold.pairs:
        gold_counts = _sums(answers.gold)[0]
    blocks = []
    if answers.values.total:
        names = {"generate": "Most frequent texts", "tag": "Tokens by label"}
        blocks.append(_distribution(names.get(answers.kind, "Labels"), answers.values, answers.labels, gold_counts))
    blocks += [_distribution(f"Field {shown(name, 60)}", values, (), {}) for name, values in answers.fields.items()]
    if answers.finished.total:
        blocks.append(_distribution("Ended by", answers.finished, (), {}))
    return {
        "blocks": blocks,
        "confidence": _unit_histogram(answers.confidence, "Confidence", answers.gold is not None, answers.kind),
        "off_set_mass": _unit_histogram(answers.off_set_mass, "off_set_mass", False, answers.kind),
        "numbers": _numbers(answers.numbers, "Length of vectors" if answers.kind == "embed" else "Values"),
        "lengths": _lengths(answers.lengths.counts, _LENGTHS.get(answers.kind, "")),
    }


_LENGTHS = {"generate": "Tokens of an answer", "tag": "Tokens of a row", "classify": "Labels of a row"}


def _distribution(title: str, values: Values, order: Sequence[str], gold: Mapping[str, int]) -> dict[str, Any]:
    """`order` lists values that are shown even if they do not occur."""
    listed = values.ranked()
    if not order and len(listed) > VALUES_SHOWN:
        listed = [(name, rows) for name, rows in listed if rows > 1]  # single ones tell nothing
    ranked = listed + [(name, 0) for name in order if name not in values.counts]
    most = LABELS_SHOWN if order else VALUES_SHOWN
    total, num_gold = values.total, sum(gold.values())
    highest = max([rows / total for _, rows in ranked[:1]] + [rows / num_gold for rows in gold.values()], default=1.0)
    rows = []
    for name, count in ranked[:most]:
        second = gold.get(name, 0) / num_gold if num_gold else None
        rows.append(
            {
                "name": shown(name, 80),
                "rows": count,
                "share": count / total,
                "gold": second,
                "bar": charts.bar(count / total / highest, None if second is None else second / highest),
            }
        )
    rest = total - sum(count for _, count in ranked[:most])
    different = f"{len(values.counts):,}" + ("+" if values.others else "")
    return {"title": title, "rows": rows, "rest": rest, "total": total, "different": different, "gold": bool(num_gold)}


def _unit_histogram(values: UnitHistogram, name: str, judged: bool, kind: str) -> dict[str, Any] | None:
    if not values.rows:
        return None
    right, wrong, other = values.bins
    stacks = list(zip(right.tolist(), wrong.tolist(), other.tolist(), strict=True))
    if not judged:
        stacks = [(0, 0, sum(stack)) for stack in stacks]
    edges = [k / len(stacks) for k in range(len(stacks) + 1)]
    title = f"Rows by {name.lower() if name == 'Confidence' else name}"
    shares = values.bins.sum(axis=0) / values.rows
    top = f"{percent(float(shares[-2:].sum()))} of the rows from 0.9 up, {percent(float(shares[:10].sum()))} below 0.5"
    about = {
        "Confidence": {
            "tag": "the score of a row's least sure token",
            "generate": "the geometric mean of an answer's token probabilities",
        }.get(kind, "the probability of the answer among the labels"),
        "off_set_mass": "the probability of anything but a label, before the labels share 1 among them",
    }[name]
    return {
        "title": name,
        "about": about,
        "chart": charts.histogram(stacks, edges, title=title, x_name=name.lower()),
        "told": f"{top}; mean {values.mean:.3f}, highest {values.highest:.3f}",
        "judged": judged,
        "table": [
            (f"{low:.2f} to {high:.2f}", *map(int, stack))
            for low, high, stack in zip(edges[:-1], edges[1:], stacks, strict=True)
            if sum(stack)
        ],
    }


def _numbers(numbers: NumberRange, title: str) -> dict[str, Any] | None:
    if not numbers.rows:
        return None
    import numpy as np

    heights, edges = np.histogram(numbers.sample, BARS, (numbers.low, numbers.high))
    sampled = f"; the bars show a sample of {len(numbers.sample):,}" if len(numbers.sample) < numbers.rows else ""
    return {
        "title": title,
        "chart": charts.histogram([(0, 0, int(rows)) for rows in heights], edges.tolist(), title=title, x_name=title),
        "told": f"{numbers.low:.4g} to {numbers.high:.4g}, mean {numbers.mean:.4g}{sampled}",
    }


def _lengths(counts: Mapping[int, int], title: str) -> dict[str, Any] | None:
    """Whole numbers in equal bars; the last one holds all that are longer than nearly every row."""
    if not counts or not title:
        return None
    values = sorted(counts)
    total, seen, usual = sum(counts.values()), 0, values[-1]
    for value in values:
        seen += counts[value]
        if seen >= 0.995 * total:
            usual = value
            break
    low = values[0]
    step = max(math.ceil((usual - low + 1) / BARS), 1)
    num_bars = math.ceil((usual - low + 1) / step)
    heights = [0] * num_bars
    for value, rows in counts.items():
        heights[min((value - low) // step, num_bars - 1)] += rows
    longer = sum(rows for value, rows in counts.items() if value >= low + step * num_bars)
    edges = [float(low + step * k) for k in range(num_bars + 1)]
    mean = sum(value * rows for value, rows in counts.items()) / total
    told = f"{values[0]:,} to {values[-1]:,}, mean {mean:,.1f}"
    return {
        "title": title,
        "chart": charts.histogram([(0, 0, rows) for rows in heights], edges, title=title, x_name=title.lower()),
        "told": told + (f"; the last bar holds {longer:,} longer ones too" if longer else ""),
    }


# ---- gold


def _sums(gold: Gold) -> tuple[dict[str, int], dict[str, int]]:
    """Rows by gold answer and by answer."""
    by_gold: dict[str, int] = {}
    by_answer: dict[str, int] = {}
    for (truth, given), rows in gold.pairs.items():
        by_gold[truth] = by_gold.get(truth, 0) + rows
        by_answer[given] = by_answer.get(given, 0) + rows
    return by_gold, by_answer


def _gold(answers: Answers) -> dict[str, Any] | None:
    gold = answers.gold
    if gold is None:
        return None
    low, high = wilson(gold.right, gold.rows)
    context: dict[str, Any] = {
        "rows": gold.rows,
        "right": gold.right,
        "failed": gold.failed,
        "accuracy": gold.right / gold.rows,
        "low": low,
        "high": high,
        "classes": None,
        "reliability": None,
    }
    if gold.pairs:
        context["classes"] = classes_of(gold, answers.labels)
    if gold.reliability is not None:
        context["reliability"] = reliability_of(gold)
    return context


def classes_of(gold: Gold, labels: Sequence[str]) -> dict[str, Any]:
    """Confusion, and precision, recall and F1 of each label, the LABELS_SHOWN most frequent ones in their order."""
    import numpy as np

    by_gold, by_answer = _sums(gold)
    every = list(dict.fromkeys((*labels, *sorted(by_gold), *sorted(set(by_answer) - {NO_ANSWER}))))
    ranked = sorted(every, key=lambda name: -by_gold.get(name, 0) - by_answer.get(name, 0))
    kept = [name for name in every if name in ranked[:LABELS_SHOWN]]
    columns = [*kept, *([NO_ANSWER] if by_answer.get(NO_ANSWER) else [])]
    counts = np.array([[gold.pairs[truth, given] for given in (*every, NO_ANSWER)] for truth in every], np.int64)
    per_label = [_label_row(name, gold, by_gold, by_answer) for name in kept]
    return {
        "labels": [shown(name, 40) for name in columns],
        "matrix": [_matrix_row(name, columns, gold, by_gold.get(name, 0)) for name in kept],
        "per_label": per_label,
        "left_out": len(every) - len(kept),
        "wide": len(columns) > NARROW_MATRIX,
        "metrics": [(METRICS[name], float(formula(counts))) for name, formula in RESAMPLED.items()],
    }


def _label_row(name: str, gold: Gold, by_gold: Mapping[str, int], by_answer: Mapping[str, int]) -> dict[str, Any]:
    right, truth, given = gold.pairs[name, name], by_gold.get(name, 0), by_answer.get(name, 0)
    return {
        "name": shown(name, 60),
        "gold": truth,
        "answered": given,
        "precision": right / given if given else None,
        "recall": right / truth if truth else None,
        "f1": 2 * right / (truth + given) if truth + given else None,
    }


def _matrix_row(name: str, columns: Sequence[str], gold: Gold, total: int) -> dict[str, Any]:
    cells = []
    for given in columns:
        rows = gold.pairs[name, given]
        share = rows / total if total else 0.0
        side = "hit" if given == name else "miss"
        cells.append({"rows": rows, "share": share, "heat": f"{side}-{math.ceil(share * 5)}" if rows else "none"})
    return {"name": shown(name, 40), "cells": cells, "total": total}


def reliability_of(gold: Gold) -> dict[str, Any]:
    """The diagram with its numbers, for gold that has probabilities."""
    found = gold.reliability
    assert found is not None
    points = []
    for rows, sure, right in zip(found.rows.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True):
        if rows:
            points.append((sure, right, *wilson(right * rows, rows), rows))
    return {
        "chart": charts.reliability(points, title="Accuracy by confidence"),
        "ece": found.ece,
        "brier": gold.brier / gold.brier_rows if gold.brier_rows else None,
        "table": points,
    }


def wilson(right: float, rows: float) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); (0, 1) without rows."""
    if rows <= 0:
        return 0.0, 1.0
    share, extra = right / rows, Z * Z / rows
    middle = (share + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(share * (1 - share) / rows + extra / (4 * rows))
    return max(middle - half, 0.0), min(middle + half, 1.0)


# ---- errors, time, tokens, job


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
            ("First unit began", _clock(line.start)),
            ("Last commit", _clock(line.end)),
            ("Time of work", duration(line.active_s)),
            (
                "Pauses",
                f"{len(line.pauses)}, {duration(sum(b - a for a, b in line.pauses))} in all" if line.pauses else "none",
            ),
            (
                "Stalls",
                f"{len(line.stalls)}, {duration(sum(b - a for a, b in line.stalls))} in all" if line.stalls else "none",
            ),
            ("A unit in the engine", f"{duration(line.unit_s)} (median)"),
        ]
    again = sum(rows for attempts, rows in found.attempts.items() if attempts > 1)
    facts += [
        ("Units", f"{found.parts:,} of {collected.plan.num_units:,}, {collected.plan.unit_rows:,} rows each at most"),
        ("Rows processed again", f"{again:,} in {line.retried_units:,} units" if again else "none"),
    ]
    chart = None
    if line.known:
        pauses = [(line.active(start), f"paused {duration(stop - start)}") for start, stop in line.pauses]
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
        "bar": charts.stacked_bar([(name, value) for name, _, value in parts], "Tokens read, cached and written"),
        "parts": [(name, told, value, value / total if total else 0.0, value / rows) for name, told, value in parts],
        "media": counts.media_tokens,
        "media_share": counts.media_tokens / counts.prompt_tokens if counts.prompt_tokens else 0.0,
        "total": total,
        "prompts": _lengths(collected.found.prompt_lengths.counts, "Tokens of a prompt"),
    }


def _files(collected: Collected) -> dict[str, Any]:
    files = collected.plan.files
    shown_files = [(each.file.name, each.num_rows, each.file.size) for each in files[:FILES_SHOWN]]
    return {"shown": shown_files, "more": max(len(files) - FILES_SHOWN, 0), "bytes": collected.found.num_bytes}


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


__all__ = [
    "Card",
    "Note",
    "Tile",
    "classes_of",
    "compact",
    "percent",
    "reliability_of",
    "render",
    "render_job",
    "wilson",
]
