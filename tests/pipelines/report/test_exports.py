"""Rows for review, probabilities for cleanlab, and the command that writes them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from glm_batch.glm_actors.media.media_source import MediaRules, read_source
from glm_batch.jobs.__main__ import app
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import CommitSection, Job, TaskConfig
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.report.committed_rows import committed_rows
from glm_batch.pipelines.report.review import MARGIN, MASS, review_table, to_jsonl, write_pred_probs
from tests.pipelines.report.world import LABELS, TYPES, a_job, choose_job, chosen, commit_rows

ROWS = 60


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return choose_job(tmp_path)


@pytest.fixture
def probabilities() -> np.ndarray:
    return np.random.default_rng(5).dirichlet([1, 1, 1], ROWS)


@pytest.fixture
def masses() -> np.ndarray:
    return np.random.default_rng(6).random(ROWS)


def review_of(job: Job, k: int) -> pa.Table:
    with committed_rows(Output.at(job.output), job) as rows:
        return review_table(rows, k)


def commit_all(job: Job, probabilities: np.ndarray, masses: np.ndarray) -> None:
    gold = [LABELS[k % 3] for k in range(ROWS - 2)] + [None, "purple"]
    rows = pa.table(
        {"id": [f"k{n}" for n in range(ROWS)], "text": [f"t{n}" for n in range(ROWS)], "gold": gold}
    )
    answers = [chosen(p.tolist(), mass=m) for p, m in zip(probabilities, masses, strict=True)]
    answers[3] = {"error_code": "null_prompt"}
    commit_rows(job, rows, answers)


def test_review_takes_turns_between_its_reasons(
    job: Job, probabilities: np.ndarray, masses: np.ndarray
) -> None:
    commit_all(job, probabilities, masses)
    table = review_of(job, 10)
    ordered = np.sort(probabilities, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    margin[3], mass = np.inf, np.delete(masses, 3)
    by_margin = [f"k{n}" for n in np.argsort(margin)[:10]]
    by_mass = [f"k{n}" for n in np.argsort(-np.where(np.arange(ROWS) == 3, -1, masses))[:10]]
    keys = table["row_key"].to_pylist()
    assert len(mass) == ROWS - 1
    assert keys[:2] == [by_margin[0], by_mass[0]]
    assert set(keys) <= set(by_margin) | set(by_mass)
    for row in table.to_pylist():
        number = int(row["row_key"][1:])
        assert row["reasons"] == [
            name for name, keys in ((MARGIN, by_margin), (MASS, by_mass)) if row["row_key"] in keys
        ]
        assert row["margin"] == pytest.approx(margin[number])
        assert row["prompt"] == f"Which? t{number}"
        assert row["text"] == f"t{number}"
        assert row["label_probs"] == probabilities[number].tolist()


def test_review_of_more_rows_than_there_are(
    job: Job, probabilities: np.ndarray, masses: np.ndarray
) -> None:
    commit_all(job, probabilities, masses)
    keys = review_of(job, 1000)["row_key"].to_pylist()
    assert sorted(keys) == sorted(f"k{n}" for n in range(ROWS) if n != 3)


def test_review_lines_are_input_again(job: Job, tmp_path: Path) -> None:
    """Bytes become data: URLs, which the media loader reads as the same bytes."""
    image = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    table = pa.table({"row_key": ["a\u202e"], "image": [image], "video": [{"bytes": None, "path": "clips/a.mp4"}],
                      "score": [float("nan")]})  # fmt: skip
    (line,) = to_jsonl(table).splitlines()
    row = json.loads(line)
    assert read_source(row["image"], MediaRules()) == image
    assert row["image"].startswith("data:image/png;base64,")
    assert row["video"] == {"bytes": None, "path": "clips/a.mp4"}
    assert row["score"] is None


def test_answers_without_doubt_are_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path, TaskConfig(kind="generate", prompt="{text}"))
    answer = {"text": "x", "reasoning": None, "finish_reason": "stop", "logprobs": None}
    commit_rows(job, pa.table({"id": [1], "text": ["a"]}), [answer])
    with pytest.raises(ConfigError, match=r"sampling\.logprobs"):
        review_of(job, 3)


def test_probabilities_are_what_cleanlab_asks_for(
    job: Job, probabilities: np.ndarray, masses: np.ndarray, tmp_path: Path
) -> None:
    commit_all(job, probabilities, masses)
    said = write_pred_probs(Output.at(job.output), job, str(tmp_path / "p.npy"))
    found, given = np.load(tmp_path / "p.npy"), np.load(tmp_path / "p.labels.npy")
    kept = [n for n in range(ROWS - 2) if n != 3]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, probabilities[kept])
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    assert given.dtype == np.int64
    assert given.tolist() == [n % 3 for n in kept]
    assert pq.read_table(tmp_path / "p.rows.parquet")["row_key"].to_pylist() == [
        f"k{n}" for n in kept
    ]
    assert said == json.loads((tmp_path / "p.json").read_text())
    assert said["labels"] == LABELS
    assert said["left_out"] == {"failed": 1, "without_gold": 1, "gold_outside_of_the_labels": 1}
    # cleanlab's own checks of its input: every class as an integer from 0, one column for each
    assert set(given.tolist()) <= set(range(found.shape[1]))
    assert ((found >= 0) & (found <= 1)).all()


def test_probabilities_of_several_labels_are_refused(tmp_path: Path) -> None:
    job = a_job(tmp_path, TaskConfig(kind="classify", prompt="{text}"))
    types = {"scores": pa.list_(pa.float64()), "label": pa.list_(pa.string())}
    facts = {"problem_type": "multi_label_classification", "label_names": ["x"]}
    commit_rows(
        job,
        pa.table({"id": [1], "text": ["a"]}),
        [{"scores": [0.9], "label": ["x"]}],
        types=types,
        facts=facts,
    )
    with pytest.raises(ConfigError, match="single-label"):
        write_pred_probs(Output.at(job.output), job, str(tmp_path / "p.npy"))
    with pytest.raises(ConfigError, match=r"ends in \.npy"):
        write_pred_probs(Output.at(job.output), job, str(tmp_path / "p.csv"))
    assert TYPES["classify"]["label"] == pa.string()


def test_the_command_writes_beside_the_output_or_elsewhere(
    job: Job, probabilities: np.ndarray, masses: np.ndarray, tmp_path: Path
) -> None:
    commit_all(job, probabilities, masses)
    done = CliRunner().invoke(
        app, ["report", job.output, "--review", "4", "--pred-probs", str(tmp_path / "p.npy")]
    )
    assert done.exit_code == 0, done.output
    assert "left out" in done.stdout
    for name in ("report.html", "review.parquet", "review.jsonl"):
        assert (Path(job.output) / name).stat().st_size > 100
    assert pq.read_table(Path(job.output) / "review.parquet").num_rows == 4
    done = CliRunner().invoke(app, ["report", job.output, "--to", str(tmp_path / "there")])
    assert done.exit_code == 0
    assert (tmp_path / "there" / "report.html").read_text().startswith("<!doctype html>")


def test_the_job_file_names_its_output(
    job: Job, probabilities: np.ndarray, masses: np.ndarray, tmp_path: Path
) -> None:
    commit_all(job, probabilities, masses)
    (tmp_path / "job.yaml").write_text(f"model: m\noutput: {job.output}\n")
    assert CliRunner().invoke(app, ["report", str(tmp_path / "job.yaml")]).exit_code == 0
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert nothing.exit_code == 2
    assert "no output of glm-batch" in nothing.stderr


def test_images_travel_with_the_rows(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    job = Job(
        model=str(tmp_path / "model"), input=[str(tmp_path / "in.parquet")], output=str(tmp_path / "out"),
        task=TaskConfig(kind="choose", prompt="What?", image="image", labels=LABELS), commit=CommitSection(unit_rows=2),
    )  # fmt: skip
    images = [b"\xff\xd8\xff" + bytes([n]) for n in range(5)]
    commit_rows(
        job, pa.table({"id": list(range(5)), "image": images}), [chosen([0.4, 0.3, 0.3])] * 5
    )
    table = review_of(job, 3)
    assert table["image"].to_pylist() == images[:3]
    lines = [json.loads(line) for line in to_jsonl(table).splitlines()]
    assert [base64.b64decode(line["image"].partition(",")[2]) for line in lines] == images[:3]
