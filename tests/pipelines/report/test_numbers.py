"""The numbers on a page are those that pandas and scikit-learn compute from the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY, ENGINE_IDLE, IN_ENGINE, MEDIA
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.pipelines.evaluation.agreement import NUM_BINS
from glm_batch.pipelines.job import TaskConfig
from glm_batch.pipelines.report.answers import matrix
from glm_batch.pipelines.report.page import _asset
from glm_batch.pipelines.report.quality import wilson
from glm_batch.pipelines.tasks.embed_task import EmbedTask
from glm_batch.pipelines.tasks.kinds import TASKS
from tests.pipelines.report.world import (
    LABELS,
    TOKENS,
    TYPES,
    a_job,
    choose_job,
    chosen,
    commit_rows,
    page_of,
)

ROWS = 137


@pytest.fixture
def frame() -> pd.DataFrame:
    """Random answers with gold for most rows; some rows failed."""
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet([0.6] * 3, ROWS)
    gold = [LABELS[rng.choice(3, p=p)] if rng.random() < 0.9 else None for p in probabilities]
    codes = [
        str(rng.choice(["null_prompt", "bad_image"])) if rng.random() < 0.1 else None
        for _ in range(ROWS)
    ]
    return pd.DataFrame(
        {"p": list(probabilities), "gold": gold, "code": codes, "mass": rng.random(ROWS) * 0.3},
        dtype=object,
    )


@pytest.fixture
def made(frame: pd.DataFrame, tmp_path: Path) -> Any:
    job = choose_job(tmp_path)
    rows = pa.table(
        {
            "id": list(range(ROWS)),
            "text": [f"text {k}" for k in range(ROWS)],
            "gold": frame["gold"].tolist(),
        }
    )
    answers = [
        {"error_code": each.code} if each.code else chosen(each.p.tolist(), mass=each.mass)
        for each in frame.itertuples()
    ]
    return commit_rows(job, rows, answers), job


def test_counts_errors_and_tokens(made: Any, frame: pd.DataFrame) -> None:
    page = page_of(*made)
    failed = frame["code"].notna().sum()
    assert page.tiles["Rows"] == str(ROWS)
    assert page.tiles["Failed"] == str(failed)
    for code, rows in frame["code"].value_counts().items():
        assert f"{code} {rows} rows, {rows / ROWS * 100:.1f} %" in page.text
    tokens = {cells[0]: cells[1] for cells in page.table_with("tokens")}
    assert tokens["cached prompt"] == f"{TOKENS['cached_tokens'] * (ROWS - failed):,}"
    assert tokens["read by the model"] == f"{30 * (ROWS - failed):,}"


def test_the_label_distribution(made: Any, frame: pd.DataFrame) -> None:
    ok = frame[frame["code"].isna()]
    expected = pd.Series([LABELS[np.argmax(p)] for p in ok["p"]]).value_counts()
    shown = {cells[0]: cells[2] for cells in page_of(*made).table_with("bar")}
    assert shown == {label: str(rows) for label, rows in expected.items()}


def test_scores_against_gold(made: Any, frame: pd.DataFrame) -> None:
    with_gold = frame[frame["gold"].notna()]
    answers = [
        "none" if code else LABELS[np.argmax(p)]
        for p, code in zip(with_gold["p"], with_gold["code"], strict=True)
    ]
    gold = with_gold["gold"].tolist()
    page = page_of(*made)
    right = np.mean([a == g for a, g in zip(answers, gold, strict=True)])
    assert f"{right * 100:.1f} % of {len(gold)} rows with a gold answer are right" in page.text
    assert f"balanced accuracy {balanced_accuracy_score(gold, answers):.4f}" in page.text.replace(
        "\n", " "
    )
    assert f"macro F1 {f1_score(gold, answers, labels=LABELS, average='macro'):.4f}" in page.text
    counts = confusion_matrix(gold, answers, labels=[*LABELS, "none"])
    shown = page.table_with("(no answer)")
    for cells, expected in zip(shown, counts[:3], strict=True):
        assert [int(cell.split()[0]) for cell in cells[1:-1]] == expected.tolist()
    scores = np.array(precision_recall_fscore_support(gold, answers, labels=LABELS)[:3]).T
    for cells, expected in zip(page.table_with("precision"), scores, strict=True):
        assert cells[2:] == [f"{value:.3f}" for value in expected]


def test_reliability(made: Any, frame: pd.DataFrame) -> None:
    judged = frame[frame["gold"].notna() & frame["code"].isna()]
    sure = np.array([p.max() for p in judged["p"]])
    right = np.array(
        [LABELS[p.argmax()] == g for p, g in zip(judged["p"], judged["gold"], strict=True)]
    )
    bins = pd.cut(sure, np.linspace(0, 1, NUM_BINS + 1), include_lowest=True)
    grouped = (
        pd.DataFrame({"sure": sure, "right": right})
        .groupby(bins, observed=True)
        .agg(["mean", "size"])
    )
    page = page_of(*made)
    shown = page.table_with("mean confidence")
    assert [cells[0] for cells in shown] == [f"{value:.4f}" for value in grouped["sure"]["mean"]]
    assert [cells[1] for cells in shown] == [f"{value:.4f}" for value in grouped["right"]["mean"]]
    assert [int(cells[3]) for cells in shown] == grouped["sure"]["size"].tolist()
    weights = grouped["sure"]["size"] / len(judged)
    ece = (weights * (grouped["sure"]["mean"] - grouped["right"]["mean"]).abs()).sum()
    truth = np.array([[label == gold for label in LABELS] for gold in judged["gold"]], float)
    brier = ((np.stack(judged["p"].to_list()) - truth) ** 2).sum(1).mean()
    assert f"Expected calibration error {ece:.4f}, Brier score {brier:.4f}." in page.text


def test_seconds_by_stage_and_the_bottleneck(tmp_path: Path) -> None:
    job = choose_job(tmp_path)
    rows = pa.table({"id": list(map(str, range(20))), "text": ["x"] * 20, "gold": ["red"] * 20})
    spent = {
        IN_ENGINE: 9.0,
        ENGINE_BUSY: 3.0,
        ENGINE_IDLE: 1.0,
        "reading": 0.5,
        MEDIA: 7.0,
        "preparing": 2.0,
    }
    page = page_of(commit_rows(job, rows, [chosen([0.5, 0.3, 0.2])] * 20, spent=spent), job)
    assert page.tiles["Engine busy"] == "6.0 s, 75.0 % of its time"
    assert page.tiles["Media"] == "14.0 s of workers' time"
    assert page.tiles["Bottleneck"].startswith("media: raise preprocess.workers")


def test_the_confidence_histogram(made: Any, frame: pd.DataFrame) -> None:
    ok = frame[frame["code"].isna()]
    sure = np.array([p.max() for p in ok["p"]])
    heights = np.histogram(sure, 20, (0, 1))[0]
    shown = page_of(*made).table_with("Confidence")
    assert [sum(map(int, cells[1:])) for cells in shown] == heights[heights > 0].tolist()


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)


def test_gold_of_a_changed_input_is_missing_and_said_to_be(made: Any, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes() + b"\0")
    page = page_of(*made)
    assert "1 input files cannot be read any more" in page.text
    assert "Against gold" not in page.text
    assert page.tiles["Rows"] == str(ROWS)


def test_a_carried_gold_column_stands_in_for_a_lost_input(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    job = choose_job(tmp_path)
    rows = pa.table({"id": [1, 2], "text": ["a", "b"], "gold": ["red", "green"]})
    answers = [
        {**chosen([0.8, 0.1, 0.1]), "gold": "red"},
        {**chosen([0.7, 0.2, 0.1]), "gold": "green"},
    ]
    output = commit_rows(job, rows, answers, types={**TYPES["choose"], "gold": pa.string()})
    (tmp_path / "in.parquet").unlink()
    assert "50.0 % of 2 rows" in page_of(output, job).text


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "generate": (
        {},
        {"text": "yes", "reasoning": None, "finish_reason": "length", "logprobs": [-0.1, -0.2]},
        "yes",
    ),
    "extract": (
        {"schema": {"type": "object"}},
        {"json": '{"order": "A1", "n": 2}'},
        '{"n": 2, "order": "A1"}',
    ),
    "classify": ({}, {"scores": [0.2, 0.8], "label": "spam"}, "spam"),
    "tag": (
        {},
        {"tokens": [{"text": "Rome", "start": 0, "end": 4, "label": "LOC", "score": 0.9}]},
        None,
    ),
    "embed": ({}, {"vector": [0.0, 3.0, 4.0]}, None),
    "loglikelihood": ({}, {"logprob": -6.0, "num_tokens": 3, "perplexity": 7.389}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_has_a_page(kind: str, tmp_path: Path) -> None:
    task, answer, gold = KINDS[kind]
    job = a_job(tmp_path, TaskConfig(kind=kind, prompt="{text}", gold=gold and "gold", **task))  # type: ignore[arg-type]
    columns: dict[str, Any] = {
        "id": [1, 2, 3],
        "text": ["a", "b", "c"],
        **({"gold": [gold] * 3} if gold else {}),
    }
    answers = [answer, {"error_code": "empty_text"}, answer]
    output = commit_rows(job, pa.table(columns), answers, facts={"label_names": ["ham", "spam"]})
    page = page_of(output, job)
    assert page.tiles["Rows"] == "3"
    assert ("66.7 % of 3 rows" in page.text) == bool(gold)
    said = {"generate": "cut off at", "extract": "Field order", "classify": "spam", "tag": "Rome/LOC",
            "embed": "5 in 3 dimensions", "loglikelihood": "perplexity: 7.389"}  # fmt: skip
    assert said[kind] in page.text


def test_several_answers_a_row(tmp_path: Path) -> None:
    texts = pa.list_(pa.string())
    types = {
        "text": texts,
        "reasoning": texts,
        "finish_reason": texts,
        "logprobs": pa.list_(pa.list_(pa.float32())),
    }
    job = a_job(
        tmp_path,
        TaskConfig(kind="generate", prompt="{text}", gold="gold"),
        sampling=SamplingParams(n=2),
    )
    answer = {
        "text": ["4", "5"],
        "reasoning": [None, None],
        "finish_reason": ["stop", "stop"],
        "logprobs": [None] * 2,
    }
    output = commit_rows(
        job, pa.table({"id": [1], "text": ["2+2"], "gold": ["5"]}), [answer], types=types
    )
    assert "50.0 % of 1 rows" in page_of(output, job).text


def test_several_labels_and_numbers_of_classify(tmp_path: Path) -> None:
    job = a_job(tmp_path, TaskConfig(kind="classify", prompt="{text}"))
    rows = pa.table({"id": [1, 2], "text": ["a", "b"]})
    many = {"scores": pa.list_(pa.float64()), "label": pa.list_(pa.string())}
    answers = [{"scores": [0.9, 0.7], "label": ["x", "y"]}, {"scores": [0.9, 0.1], "label": ["x"]}]
    output = commit_rows(job, rows, answers, types=many, facts={"label_names": ["x", "y"]})
    assert [cells[:3:2] for cells in page_of(output, job).table_with("bar")] == [
        ["x", "2"],
        ["y", "1"],
    ]
    other = a_job(tmp_path, TaskConfig(kind="classify", prompt="{text}"))
    object.__setattr__(other, "output", str(tmp_path / "numbers"))
    numbers = {"scores": pa.list_(pa.float64()), "label": pa.float64()}
    output = commit_rows(
        other, rows, [{"scores": [v], "label": v} for v in (-2.5, 4.0)], types=numbers
    )
    assert "-2.5 to 4, mean 0.75" in page_of(output, other).text


def test_an_unfinished_job_says_so(made: Any, tmp_path: Path, frame: pd.DataFrame) -> None:
    job = choose_job(tmp_path)
    object.__setattr__(job, "output", str(tmp_path / "half"))
    rows = pa.table({"id": list(range(50)), "text": ["t"] * 50, "gold": ["red"] * 50})
    page = page_of(commit_rows(job, rows, [chosen([0.9, 0.05, 0.05])] * 50, units=2), job)
    assert "2 of 5 units are committed" in page.text
    assert "40.0 % done" in page.text
    assert page.tiles["Rows"] == "20"


def test_an_output_without_any_committed_unit(tmp_path: Path) -> None:
    job = choose_job(tmp_path)
    rows = pa.table({"id": [1], "text": ["t"], "gold": ["red"]})
    page = page_of(commit_rows(job, rows, [chosen([1, 0, 0])], units=0), job)
    assert "No row has been answered yet." in page.text


def test_a_job_with_errors_only(tmp_path: Path) -> None:
    job = choose_job(tmp_path)
    rows = pa.table({"id": list(range(30)), "text": ["t"] * 30, "gold": ["red"] * 30})
    page = page_of(commit_rows(job, rows, [{"error_code": "null_prompt"}] * 30), job)
    assert "30 rows failed (100 %)" in page.text
    assert "0 % of 30 rows with a gold answer are right" in page.text
    assert "No row has been answered yet." in page.text


def test_a_report_is_the_same_again(made: Any) -> None:
    first, second = (page_of(*made).html for _ in range(2))
    assert first.partition("<footer>")[0] == second.partition("<footer>")[0]


def test_a_column_of_lists_becomes_a_matrix() -> None:
    column = pa.chunked_array([[[1.0, 2.0], None], [[3.0, 4.0]]], pa.list_(pa.float64()))
    np.testing.assert_array_equal(matrix(column), [[1, 2], [np.nan, np.nan], [3, 4]])
    assert matrix(pa.chunked_array([[None]], pa.list_(pa.float64()))).shape == (1, 0)


def test_what_was_left_out_of_a_long_label_list_is_counted(tmp_path: Path) -> None:
    labels = [f"label {k:02}" for k in range(40)]
    job = a_job(tmp_path, TaskConfig(kind="choose", prompt="{text}", labels=labels, gold="gold"))
    rng = np.random.default_rng(1)
    answers = [chosen(rng.dirichlet([1] * 40).tolist(), labels) for _ in range(200)]
    gold = [labels[k % 40] for k in range(200)]
    output = commit_rows(
        job, pa.table({"id": list(range(200)), "text": ["t"] * 200, "gold": gold}), answers
    )
    page = page_of(output, job)
    bars = page.table_with("bar")
    assert len(bars) == 20
    hidden = 200 - sum(int(cells[2]) for cells in bars)
    given = len({answer["label"] for answer in answers})
    assert f"20 of {given} shown; those not shown have {hidden} of 200." in page.text
    assert "20 rarer labels are not shown" in page.text


def test_metrics_count_every_label_however_many_there_are(tmp_path: Path) -> None:
    """They were those of the first 200 gold labels: the rows of all others counted as wrong."""
    labels = [f"label {k:03}" for k in range(300)]
    job = a_job(tmp_path, TaskConfig(kind="choose", prompt="{text}", labels=labels, gold="gold"))
    rng = np.random.default_rng(1)
    gold = [labels[k % 300] for k in range(900)]
    given = [g if rng.random() < 0.6 else labels[rng.integers(300)] for g in gold]
    answers = [
        {"label": label, "probability": 0.5, "label_probs": [0.5, *[0.5 / 299] * 299], "off_set_mass": 0.0}
        for label in given
    ]  # fmt: skip
    rows = pa.table({"id": list(range(900)), "text": ["t"] * 900, "gold": gold})
    page = page_of(commit_rows(job, rows, answers), job)
    assert f"balanced accuracy {balanced_accuracy_score(gold, given):.4f}" in page.text
    assert f"macro F1 {f1_score(gold, given, labels=labels, average='macro'):.4f}" in page.text
    assert f"micro F1 {f1_score(gold, given, average='micro'):.4f}" in page.text
    assert "280 rarer labels are not shown" in page.text


def test_a_kind_that_the_report_does_not_know_has_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "weigh", EmbedTask)  # type: ignore[arg-type]
    job = a_job(tmp_path, TaskConfig(kind="weigh", prompt="{text}"), carry=["year"])  # type: ignore[arg-type]
    weights = np.random.default_rng(0).normal(size=40)
    columns = {"id": list(range(40)), "text": ["t"] * 40, "year": [2000] * 40}
    types = {"weight": pa.float64(), "scale": pa.string(), "year": pa.int64()}
    answers = [{"weight": w, "scale": "kg", "year": 2000} for w in weights]
    output = commit_rows(job, pa.table(columns), [*answers[:-1], {"error_code": "x"}], types=types)
    page = page_of(output, job)
    assert page.tiles["Rows"] == "40"
    kept = weights[:-1]
    assert f"{kept.min():.4g} to {kept.max():.4g}, mean {kept.mean():.4g}" in page.text
    assert "mean 2000" not in page.text
    assert "weight: " in page.text


def test_rows_without_gold_are_grey(made: Any, tmp_path: Path) -> None:
    """They were as blue as right ones. Where no row has gold all bars are blue."""
    panels = [
        each["class"] for tag, each in page_of(*made).elements if tag == "div" and "class" in each
    ]
    assert panels.count("panel judged") == 1  # confidence; off_set_mass is not told apart
    assert ".judged .other, .key.other { fill: var(--grey);" in _asset("style.css")
    job = choose_job(tmp_path)
    object.__setattr__(job, "output", str(tmp_path / "no gold"))
    rows = pa.table({"id": [1], "text": ["t"], "gold": pa.array([None], pa.string())})
    assert "panel judged" not in page_of(commit_rows(job, rows, [chosen([1, 0, 0])]), job).html
