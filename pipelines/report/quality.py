"""The parts of a page about answers: how they are distributed, how sure they are, and how they
stand against gold.

Numbers become charts and rows of tables here. Knows nothing of HTML beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_batch.pipelines.evaluation.classes import RESAMPLED
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.answers import NO_ANSWER, Answers, Gold
from glm_batch.pipelines.report.tallies import NumberRange, UnitHistogram, Values
from glm_batch.pipelines.report.text import percent, shown

LABELS_SHOWN = 20
VALUES_SHOWN = 10
BARS = 24
NARROW_MATRIX = 5  # columns of a confusion matrix that fit into half of the page
Z = 1.959964  # of a two-sided interval of 95 %
METRICS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}


def answers_section(answers: Answers) -> dict[str, Any]:
    gold_counts: Mapping[str, int] = {}
    if answers.gold is not None and answers.gold.pairs:
        gold_counts = sums(answers.gold)[0]
    blocks = []
    if answers.values.total:
        names = {"generate": "Most frequent texts", "tag": "Tokens by label"}
        blocks.append(
            _distribution(
                names.get(answers.kind, "Labels"), answers.values, answers.labels, gold_counts
            )
        )
    blocks += [
        _distribution(f"Field {shown(name, 60)}", values, (), {})
        for name, values in answers.fields.items()
    ]
    if answers.finished.total:
        blocks.append(_distribution("Ended by", answers.finished, (), {}))
    return {
        "blocks": blocks,
        "confidence": _unit_histogram(
            answers.confidence, "Confidence", answers.gold is not None, answers.kind
        ),
        "off_set_mass": _unit_histogram(answers.off_set_mass, "off_set_mass", False, answers.kind),
        "numbers": _numbers(
            answers.numbers, "Length of vectors" if answers.kind == "embed" else "Values"
        ),
        "lengths": lengths_chart(answers.lengths.counts, _LENGTHS.get(answers.kind, "")),
    }


_LENGTHS = {
    "generate": "Tokens of an answer",
    "tag": "Tokens of a row",
    "classify": "Labels of a row",
}


def _distribution(
    title: str, values: Values, order: Sequence[str], gold: Mapping[str, int]
) -> dict[str, Any]:
    """`order` lists values that are shown even if they do not occur."""
    listed = values.ranked()
    if not order and len(listed) > VALUES_SHOWN:
        listed = [(name, rows) for name, rows in listed if rows > 1]  # single ones tell nothing
    ranked = listed + [(name, 0) for name in order if name not in values.counts]
    most = LABELS_SHOWN if order else VALUES_SHOWN
    total, num_gold = values.total, sum(gold.values())
    highest = max(
        [rows / total for _, rows in ranked[:1]] + [rows / num_gold for rows in gold.values()],
        default=1.0,
    )
    rows = []
    for name, count in ranked[:most]:
        second = gold.get(name, 0) / num_gold if num_gold else None
        rows.append(
            {
                "name": shown(name, 80),
                "rows": count,
                "share": count / total,
                "gold": second,
                "bar": charts.bar(
                    count / total / highest, None if second is None else second / highest
                ),
            }
        )
    rest = total - sum(count for _, count in ranked[:most])
    different = f"{len(values.counts):,}" + ("+" if values.others else "")
    return {
        "title": title,
        "rows": rows,
        "rest": rest,
        "total": total,
        "different": different,
        "gold": bool(num_gold),
    }


def _unit_histogram(
    values: UnitHistogram, name: str, judged: bool, kind: str
) -> dict[str, Any] | None:
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
    heights, edges = np.histogram(numbers.sample, BARS, (numbers.low, numbers.high))
    sampled = (
        f"; the bars show a sample of {len(numbers.sample):,}"
        if len(numbers.sample) < numbers.rows
        else ""
    )
    return {
        "title": title,
        "chart": charts.histogram(
            [(0, 0, int(rows)) for rows in heights], edges.tolist(), title=title, x_name=title
        ),
        "told": f"{numbers.low:.4g} to {numbers.high:.4g}, mean {numbers.mean:.4g}{sampled}",
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
    return {
        "title": title,
        "chart": charts.histogram(
            [(0, 0, rows) for rows in heights], edges, title=title, x_name=title.lower()
        ),
        "told": told + (f"; the last bar holds {longer:,} longer ones too" if longer else ""),
    }


def sums(gold: Gold) -> tuple[dict[str, int], dict[str, int]]:
    """Rows by gold answer and by answer."""
    by_gold: dict[str, int] = {}
    by_answer: dict[str, int] = {}
    for (truth, given), rows in gold.pairs.items():
        by_gold[truth] = by_gold.get(truth, 0) + rows
        by_answer[given] = by_answer.get(given, 0) + rows
    return by_gold, by_answer


def gold_section(answers: Answers) -> dict[str, Any] | None:
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
    """Confusion, and precision, recall and F1 of each label, the LABELS_SHOWN most frequent ones in
    their order.
    """
    by_gold, by_answer = sums(gold)
    every = list(dict.fromkeys((*labels, *sorted(by_gold), *sorted(set(by_answer) - {NO_ANSWER}))))
    ranked = sorted(every, key=lambda name: -by_gold.get(name, 0) - by_answer.get(name, 0))
    kept = [name for name in every if name in ranked[:LABELS_SHOWN]]
    columns = [*kept, *([NO_ANSWER] if by_answer.get(NO_ANSWER) else [])]
    counts = np.array(
        [[gold.pairs[truth, given] for given in (*every, NO_ANSWER)] for truth in every], np.int64
    )
    per_label = [_label_row(name, gold, by_gold, by_answer) for name in kept]
    return {
        "labels": [shown(name, 40) for name in columns],
        "matrix": [_matrix_row(name, columns, gold, by_gold.get(name, 0)) for name in kept],
        "per_label": per_label,
        "left_out": len(every) - len(kept),
        "wide": len(columns) > NARROW_MATRIX,
        "metrics": [(METRICS[name], float(formula(counts))) for name, formula in RESAMPLED.items()],
    }


def _label_row(
    name: str, gold: Gold, by_gold: Mapping[str, int], by_answer: Mapping[str, int]
) -> dict[str, Any]:
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
        cells.append(
            {
                "rows": rows,
                "share": share,
                "heat": f"{side}-{math.ceil(share * 5)}" if rows else "none",
            }
        )
    return {"name": shown(name, 40), "cells": cells, "total": total}


def reliability_of(gold: Gold) -> dict[str, Any]:
    """The diagram with its numbers, for gold that has probabilities."""
    found = gold.reliability
    assert found is not None
    points = []
    for rows, sure, right in zip(
        found.rows.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True
    ):
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
