"""`glm-batch calibrate` and `task.calibration`: fitted on one half of the rows, applied to the
other.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.jobs.calibration.calibrate import calibrate
from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.files.sections import Place
from glm_batch.jobs.report.report import kept_job
from glm_batch.models.engine.api.request import Completion
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import label_scores, softmax
from glm_batch.pipelines.evaluation.scoring import Rules, score
from glm_batch.pipelines.job import EngineSection, Job, TaskConfig
from glm_batch.pipelines.planning.plan import differences, fingerprint, identify, job_source
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.tasks.rows import runner_of
from tests.pipelines.report.world import chosen, commit_rows, page_of

LABELS = ["red", "green", "blue"]
ROWS = 600
NOWHERE = Place(path="job.yaml", lines={}, overridden=frozenset())


def answers(seed: int) -> tuple[np.ndarray, list[str]]:
    """(log-probabilities of a model that is three times too sure, gold answers)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 1.2, (ROWS, 3))
    gold = (softmax(logits).cumsum(axis=1) < rng.random((ROWS, 1))).sum(axis=1)
    return np.log(softmax(3 * logits)), [LABELS[number] for number in gold]


@pytest.fixture
def world(work: Any) -> tuple[Path, Job]:
    """A finished job over gold rows; the current directory is its own."""
    root: Path = work.root
    logprobs, gold = answers(1)
    task = TaskConfig(kind="choose", prompt="Which? {text}", labels=LABELS, gold="gold")
    job = Job(
        model="model", input=[str(root / "in.parquet")], output=str(root / "out"), key="id", task=task,
        engine=EngineSection(kind="echo"),
    )  # fmt: skip
    rows = pa.table(
        {"id": list(map(str, range(ROWS))), "text": ["x"] * ROWS, "gold": [None, *gold[1:]]}
    )
    pq.write_table(rows, job.input[0])
    identity = identify(job, job_source(job).list_files(job.input), "model")
    told = [chosen(label_scores(row).probabilities, LABELS) for row in logprobs.tolist()]
    told[1] = {"error_code": "null_prompt"}
    commit_rows(job, rows, told, identity=identity)
    return root, job


def fit(root: Path, **options: Any) -> str:
    calibrate(str(root / "out"), to=str(root / "fitted.json"), **options)
    return str(root / "fitted.json")


def labelled(job: Job, logprobs: np.ndarray) -> list[dict[str, Any]]:
    """What a worker of the job makes of a model's answers."""
    runner = runner_of(prepare(job, None).spec)
    rows = []
    for number, row in enumerate(logprobs.tolist()):
        completion = Completion(id=str(number), finish_reason="stop", choice_logprobs=tuple(row))
        rows.append({"row_key": str(number)} | runner.columns({}, [completion]))
    return rows


def test_calibrated_probabilities_of_other_rows_mean_what_they_say(
    world: tuple[Path, Job], capsys: Any
) -> None:
    root, job = world
    path = fit(root)
    said = capsys.readouterr().out
    assert "2 rows left out" in said
    assert f"task.calibration: {path}" in said
    kept = json.loads(Path(path).read_text())
    assert (kept["labels"], kept["rows"], kept["bias"]) == (LABELS, ROWS - 2, [0.0, 0.0, 0.0])
    assert kept["left_out"] == {"failed": 1, "without_gold": 1}
    assert kept["ece_after"] < kept["ece_before"] / 3

    logprobs, gold = answers(2)
    plain, scaled = (labelled(each, logprobs) for each in (job, with_calibration(job, path)))
    errors = []
    for rows in (plain, scaled):
        table = pa.Table.from_pylist(rows)
        errors.append(
            score(Rules(kind="choose", labels=tuple(LABELS)), table, gold)[1].metrics["ece"].value
        )
    assert errors[0] > 0.2
    assert errors[1] < errors[0] / 3
    for before, after in zip(plain, scaled, strict=True):
        assert after["label"] == before["label"]  # a temperature moves no answer
        assert after["off_set_mass"] == before["off_set_mass"]
        assert after["probability"] == max(after["label_probs"])
        assert sum(after["label_probs"]) == pytest.approx(1.0)
    np.testing.assert_array_equal(
        [row["label_probs"] for row in plain],
        [label_scores(row).probabilities for row in logprobs.tolist()],
    )


def test_biases_go_by_label_whatever_the_order(world: tuple[Path, Job]) -> None:
    root, job = world
    path = fit(root, bias=True)
    turned = with_calibration(replace(job, task=replace(job.task, labels=LABELS[::-1])), path)
    logprobs, _ = answers(3)
    straight = labelled(with_calibration(job, path), logprobs)
    for one, other in zip(straight, labelled(turned, logprobs[:, ::-1]), strict=True):
        np.testing.assert_allclose(one["label_probs"], other["label_probs"][::-1], rtol=1e-12)
        assert one["label"] == LABELS[int(np.argmax(one["label_probs"]))]


def with_calibration(job: Job, path: str) -> Job:
    return replace(job, task=replace(job.task, calibration=path))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"labels": ["red", "green"]},
            "fitted for the labels red, green, blue, and the task has red, green; run",
        ),
        (
            {"prompt": "What? {text}"},
            r'fitted with task.prompt "Which\? {text}", and here it is "What\? {text}"',
        ),
        ({"system": "Be brief."}, 'fitted with task.system null, and here it is "Be brief."'),
        (
            {"kind": "generate", "labels": None},
            "task.calibration: only choose or classify takes it",
        ),
        ({"calibration": "nowhere.json"}, "task.calibration: nowhere.json cannot be read"),
        ({"calibration": "job.yaml"}, "task.calibration: job.yaml is no JSON text"),
        (
            {"calibration": "model/config.json"},
            "task.calibration: model/config.json is no calibration",
        ),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    world: tuple[Path, Job], work: Any, task: dict[str, Any], message: str
) -> None:
    root, job = world
    work.write_job()
    with pytest.raises(ConfigError, match=message):
        check_job(
            replace(job, task=replace(job.task, **({"calibration": fit(root)} | task))), NOWHERE
        )


def test_another_checkpoint_is_refused(world: tuple[Path, Job], work: Any) -> None:
    root, job = world
    path = fit(root)
    check_job(with_calibration(job, path), NOWHERE)
    work.write_config(max_position_embeddings=64)
    with pytest.raises(ConfigError, match="it was fitted for another checkpoint"):
        check_job(with_calibration(job, path), NOWHERE)


def test_what_it_holds_is_part_of_the_job(world: tuple[Path, Job]) -> None:
    root, job = world
    files = job_source(job).list_files(job.input)
    path = fit(root)
    identities = [identify(each, files, "model") for each in (job, with_calibration(job, path))]
    # outputs from before there was this key stay as they are
    assert "calibration" not in identities[0]["task"]
    (changed, *_) = differences(*identities)
    assert "task.calibration" in changed
    Path(path).rename(root / "renamed.json")
    moved = with_calibration(job, str(root / "renamed.json"))
    assert fingerprint(identify(moved, files, "model")) == fingerprint(identities[1])
    content = json.loads((root / "renamed.json").read_text())
    (root / "renamed.json").write_text(json.dumps(content | {"temperature": 2.5}))
    assert fingerprint(identify(moved, files, "model")) != fingerprint(identities[1])


def test_plan_manifest_and_report_show_it(world: tuple[Path, Job], work: Any) -> None:
    root, job = world
    path = fit(root)
    section = {"kind": "choose", "prompt": "Which? {text}", "labels": LABELS, "calibration": path}
    work.write_job(lambda content: content.update(task=section, output="calibrated"))
    done = work.run("plan", "job.yaml")
    assert done.code == 0, done.err
    assert "calibration" in done.out
    assert "fitted on 598 rows" in " ".join(done.out.split())
    calibrated = replace(with_calibration(job, path), output=str(root / "calibrated"))
    prepared = prepare(calibrated, None)
    assert prepared.facts["calibration"]["rows"] == ROWS - 2
    rows = pq.read_table(job.input[0])
    output = commit_rows(
        calibrated, rows, [chosen([0.5, 0.3, 0.2], LABELS)] * ROWS, identity=prepared.plan.identity
    )  # fmt: skip
    assert "calibratedtemperature 3.0" in page_of(output, kept_job(output)).text


def test_calibrated_probabilities_are_not_fitted_again(world: tuple[Path, Job]) -> None:
    root, job = world
    path = fit(root)
    calibrated = replace(with_calibration(job, path), output=str(root / "again"))
    identity = identify(calibrated, job_source(job).list_files(job.input), "model")
    commit_rows(
        calibrated, pq.read_table(job.input[0]), [chosen([0.5, 0.3, 0.2], LABELS)] * ROWS, identity=identity
    )  # fmt: skip
    with pytest.raises(ConfigError, match="calibrated already"):
        calibrate(str(root / "again"))


def test_the_file_lies_beside_the_model_and_never_in_it(
    world: tuple[Path, Job], capsys: Any
) -> None:
    root, _ = world
    calibrate(str(root / "out"))
    beside = root / "model.out.calibration.json"
    assert str(beside) in capsys.readouterr().out
    assert math.isfinite(json.loads(beside.read_text())["temperature"])
    with pytest.raises(ConfigError, match="lies in the model's directory"):
        calibrate(str(root / "out"), to=str(root / "model" / "calibration.json"))
