"""The parts of a page about answers: distributions, confidence, gold; as charts and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.answers import FIELD, LABELS
from glm_batch.pipelines.report.charts import percent, short, shown
from glm_batch.pipelines.report.committed_rows import (
    CommittedRows,
    Gold,
    Histogram,
    LabelRows,
    Values,
    in_matrix,
)

NO_ANSWER = "(no answer)"
LABELS_SHOWN, VALUES_SHOWN = 20, 10
BARS = 24
NARROW_MATRIX = 5  # columns of a confusion matrix that fit into half of the page
Z = 1.959964  # of a two-sided interval of 95 %
LENGTHS = {
    "generate": "Tokens of an answer",
    "tag": "Tokens of a row",
    "classify": "Labels of a row",
}


def answers_section(rows: CommittedRows) -> dict[str, Any]:
    kind, gold = rows.question.kind, rows.gold
    blocks = []
    for name, values in rows.values.items():
        order = rows.question.labels if name == LABELS else ()
        second = (
            {label: each.gold for label, each in gold.labels.items()}
            if gold and name == LABELS
            else {}
        )
        title = FIELD + shown(name.removeprefix(FIELD), 60) if name.startswith(FIELD) else name
        blocks.append(_distribution(title, values, order, second))
    numbers = [_numbers(found, name) for name, found in rows.numbers.items()]
    return {
        "blocks": blocks,
        "confidence": _shares(rows.confidence, "Confidence", gold is not None, kind),
        "off_set_mass": _shares(rows.off_set_mass, "off_set_mass", False, kind),
        "numbers": numbers,
        "lengths": lengths_chart(rows.frequencies("length"), LENGTHS.get(kind, "")),
    }


def _distribution(
    title: str, values: Values, order: Sequence[str], gold: Mapping[str, int]
) -> dict[str, Any]:
    """`order` lists values that are shown even if they do not occur."""
    listed = list(values.counts.items())
    if not order and len(listed) > VALUES_SHOWN:
        listed = [(name, rows) for name, rows in listed if rows > 1]  # single ones tell nothing
    ranked = listed + [(name, 0) for name in order if name not in values.counts]
    ranked = ranked[: LABELS_SHOWN if order else VALUES_SHOWN]
    total, num_gold = values.total, sum(gold.values())
    shares = [rows / total for _, rows in ranked[:1]]
    highest = max(shares + [rows / num_gold for rows in gold.values() if num_gold], default=1.0)
    rows = []
    for name, count in ranked:
        second = gold.get(name, 0) / num_gold if num_gold else None
        bar = charts.bar(count / total / highest, None if second is None else second / highest)
        own = {"name": shown(name, 80), "rows": count, "share": count / total, "gold": second}
        rows.append(own | {"bar": bar})
    return {
        "title": title,
        "rows": rows,
        "shown": sum(count > 0 for _, count in ranked),
        "rest": total - sum(count for _, count in ranked),
        "total": total,
        "different": values.different,
        "gold": bool(num_gold),
    }


def _shares(found: Histogram | None, name: str, judged: bool, kind: str) -> dict[str, Any] | None:
    """Of numbers in [0, 1]."""
    if found is None:
        return None
    by_bin = found.bins.T if judged else [(0, 0, int(rows)) for rows in found.bins.sum(axis=0)]
    stacks = [tuple(map(int, stack)) for stack in by_bin]
    edges = [k / len(stacks) for k in range(len(stacks) + 1)]
    title = f"Rows by {name.lower() if name == 'Confidence' else name}"
    shares = found.bins.sum(axis=0) / found.bins.sum()
    top = (
        f"{percent(float(shares[-2:].sum()))} of the rows from 0.9 up, "
        f"{percent(float(shares[:10].sum()))} below 0.5"
    )
    about = {
        "tag": "the score of a row's least sure token",
        "generate": "the geometric mean of an answer's token probabilities",
    }.get(kind, "the probability of the answer among the labels")
    if name != "Confidence":
        about = "the probability of anything but a label, before the labels share 1 among them"
    return {
        "title": name,
        "about": about,
        "chart": charts.histogram(stacks, edges, title=title, x_name=name.lower()),
        "told": f"{top}; mean {found.mean:.3f}, highest {found.highest:.3f}",
        "judged": judged,
        "table": [
            (f"{low:.2f} to {high:.2f}", *stack)
            for low, high, stack in zip(edges[:-1], edges[1:], stacks, strict=True)
            if sum(stack)
        ],
    }


def _numbers(found: Histogram, name: str) -> dict[str, Any]:
    heights, title = found.bins.sum(axis=0).tolist(), shown(name, 60)
    step = (found.high - found.low) / len(heights)
    edges = [found.low + step * k for k in range(len(heights) + 1)]
    stacks = [(0, 0, rows) for rows in heights]
    return {
        "title": title,
        "chart": charts.histogram(stacks, edges, title=title, x_name=title),
        "told": f"{found.lowest:.4g} to {found.highest:.4g}, mean {found.mean:.4g}",
        "judged": False,
    }


def lengths_chart(counts: Mapping[int, int], title: str) -> dict[str, Any] | None:
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
    stacks = [(0, 0, rows) for rows in heights]
    return {
        "title": title,
        "chart": charts.histogram(stacks, edges, title=title, x_name=title.lower()),
        "told": told + (f"; the last bar holds {longer:,} longer ones too" if longer else ""),
        "judged": False,
    }


def gold_section(gold: Gold | None) -> dict[str, Any] | None:
    if gold is None:
        return None
    low, high = wilson(gold.right, gold.rows)
    return {
        "rows": gold.rows,
        "failed": gold.failed,
        "accuracy": gold.right / gold.rows,
        "low": low,
        "high": high,
        "classes": classes_of(gold) if gold.labels else None,
        "reliability": reliability_of(gold),
    }


def classes_of(gold: Gold) -> dict[str, Any]:
    """Confusion, and precision, recall and F1, of the most frequent labels."""
    kept: list[str] = in_matrix(gold.labels)
    no_answer = [None] if any(given is None for _, given in gold.pairs) else []
    columns = [*kept, *no_answer]
    return {
        "labels": [short(NO_ANSWER if name is None else name, 40) for name in columns],
        "matrix": [_matrix_row(name, columns, gold) for name in kept],
        "per_label": [_label_row(name, gold.labels[name]) for name in kept],
        "left_out": gold.different - len(kept),
        "wide": len(columns) > NARROW_MATRIX,
        "metrics": list(gold.metrics.items()),
    }


def _label_row(name: str, rows: LabelRows) -> dict[str, Any]:
    both = rows.gold + rows.answered
    return {
        "name": shown(name, 60),
        "gold": rows.gold,
        "precision": rows.right / rows.answered if rows.answered else None,
        "recall": rows.right / rows.gold if rows.gold else None,
        "f1": 2 * rows.right / both if both else None,
    }


def _matrix_row(name: str, columns: Sequence[str | None], gold: Gold) -> dict[str, Any]:
    cells, total = [], gold.labels[name].gold
    for given in columns:
        rows = gold.pairs.get((name, given), 0)
        share = rows / total if total else 0.0
        side = "hit" if given == name else "miss"
        heat = f"{side}-{math.ceil(share * 5)}" if rows else "none"
        cells.append({"rows": rows, "share": share, "heat": heat})
    return {"name": short(name, 40), "cells": cells, "total": total}


def reliability_of(gold: Gold) -> dict[str, Any] | None:
    """The diagram with its numbers; None for answers without probabilities."""
    found = gold.reliability
    if found is None:
        return None
    bins = zip(found.rows.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True)
    points = [
        (sure, right, *wilson(right * rows, rows), rows) for rows, sure, right in bins if rows
    ]
    return {
        "chart": charts.reliability(points, title="Accuracy by confidence"),
        "ece": found.ece,
        "brier": gold.brier,
        "table": points,
    }


def wilson(right: float, rows: float) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); (0, 1) without rows.

    `right` may be a fraction, as it is for several samples a row; scipy's takes whole numbers only.
    """
    if rows <= 0:
        return 0.0, 1.0
    share, extra = right / rows, Z * Z / rows
    middle = (share + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(share * (1 - share) / rows + extra / (4 * rows))
    return max(middle - half, 0.0), min(middle + half, 1.0)
