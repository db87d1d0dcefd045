"""What a report is computed with: choosing rows, times, pictures, charts, and memory that does not
grow.
"""

from __future__ import annotations

import base64
import io
import json
import time
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.models.processing.messages import MediaPart
from glm_batch.pipelines.job import CommitSection, Job, MediaSection, TaskConfig
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.answers import TEXTS, Question, row_facts
from glm_batch.pipelines.report.cards import pictures
from glm_batch.pipelines.report.charts import compact, duration, percent
from glm_batch.pipelines.report.committed_rows import MAX_VALUES, NUMBER_BINS, committed_rows
from glm_batch.pipelines.report.timeline import Clock
from tests.pipelines.report.world import a_job, choose_job, chosen, commit_rows, page_of


def scored(folder: Path, sure: list[float | None], unit_rows: int = 7) -> tuple[Output, Job]:
    """An output whose rows have these confidences; None for one that failed."""
    job = choose_job(folder)
    object.__setattr__(job, "commit", CommitSection(unit_rows=unit_rows))
    rows = pa.table(
        {"id": list(range(len(sure))), "text": ["t"] * len(sure), "gold": [None] * len(sure)}
    )
    answers = [
        {"error_code": "x"} if value is None else {**chosen([1, 0, 0]), "probability": value}
        for value in sure
    ]
    return commit_rows(job, rows, answers), job


def test_the_lowest_rows_are_those_of_a_sort(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sure = [None if value == 5 else float(value) / 5 for value in rng.integers(0, 6, 40).tolist()]
    expected = sorted((value, *divmod(k, 7)) for k, value in enumerate(sure) if value is not None)
    with committed_rows(*scored(tmp_path, sure)) as rows:
        for size in (1, 3, 12, 100):
            found = rows.lowest("confidence", size)
            assert found == [(unit, row) for _, unit, row in expected[:size]]
        picked = rows.picked(found)
        assert [picked[unit, row].columns["row_key"] for unit, row in found] == [
            str(unit * 7 + row) for unit, row in found
        ]


def test_a_sample_is_fair_and_does_not_depend_on_the_rest(tmp_path: Path) -> None:
    with committed_rows(*scored(tmp_path, [0.5] * 2000, 100)) as rows:
        drawn = [
            chance
            for (chance,) in rows.db.sql("SELECT chance FROM facts ORDER BY unit, row").fetchall()
        ]
    assert abs(np.mean(drawn) - 0.5) < 0.02
    part = Output.at(str(tmp_path / "out")).manifest()
    table = Output.at(str(tmp_path / "out")).read_part(part.parts[7])
    again = row_facts(Question("choose", ("a", "b", "c")), 7, table, None)["chance"]
    assert again.to_pylist() == drawn[700:800]


def test_counts_of_values_keep_their_sum(tmp_path: Path) -> None:
    job = a_job(
        tmp_path, TaskConfig(kind="generate", prompt="{text}"), commit=CommitSection(unit_rows=500)
    )
    texts = [f"text {k % (MAX_VALUES + 10):05}" for k in range(2 * MAX_VALUES + 20)]
    rows = pa.table({"id": list(range(len(texts))), "text": ["t"] * len(texts)})
    answers = [
        {"text": text, "reasoning": None, "finish_reason": "stop", "logprobs": None}
        for text in texts
    ]
    with committed_rows(commit_rows(job, rows, answers), job) as found:
        values = found.values[TEXTS]
    assert list(values.counts.items()) == [(f"text {k:05}", 2) for k in range(MAX_VALUES)]
    assert (values.different, values.total) == (MAX_VALUES + 10, len(texts))


def test_a_histogram_of_shares_and_of_numbers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(3000)
    with committed_rows(*scored(tmp_path, [*values, None], 100)) as rows:
        shares = rows.confidence
    assert shares is not None
    np.testing.assert_array_equal(shares.bins[2], np.histogram(values, 20, (0, 1))[0])
    assert shares.mean == pytest.approx(values.mean())
    (tmp_path / "embed").mkdir()
    job = a_job(
        tmp_path / "embed",
        TaskConfig(kind="embed", prompt="{text}"),
        commit=CommitSection(unit_rows=100),
    )
    table = pa.table({"id": list(range(3000)), "text": ["t"] * 3000})
    answers = [{"vector": [value, 0.0, 0.0]} for value in values]
    with committed_rows(commit_rows(job, table, answers), job) as rows:
        (numbers,) = rows.numbers.values()
    exact = values.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(numbers.bins.sum(0), np.histogram(exact, NUMBER_BINS)[0])
    assert (numbers.lowest, numbers.highest) == (exact.min(), exact.max())


def record(
    unit: int, committed: float | None, seconds: float | None = 2.0, generation: int = 1
) -> CommitRecord:
    return CommitRecord(
        unit=unit, generation=generation, part="p", rows=10, num_bytes=1, checksum="", counts=Counts(),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(committed)) if committed is not None else "",
        spent={IN_ENGINE: seconds} if seconds is not None else {},
    )  # fmt: skip


def test_pauses_and_stalls_are_told_apart() -> None:
    clock = Clock()
    for unit in range(20):  # one second apart, in work without a break
        clock.add(record(unit, 1000.0 + unit))
    clock.add(record(20, 1060.0, seconds=42.0))  # 41 s without a commit, while this one was in work
    for unit in range(21, 41):  # an hour later
        clock.add(record(unit, 4660.0 + unit - 20))
    line = clock.timeline()
    assert line.stalls == ((1019.0, 1060.0),)
    assert line.pauses == ((1060.0, 4659.0),)
    assert line.active_s == pytest.approx(4680 - 998 - 3599)
    assert (line.rates * np.diff(line.edges)).sum() == pytest.approx(410)  # every row is somewhere
    assert line.rows_per_s == pytest.approx(410 / line.active_s)
    assert line.active(1060.0) == line.active(4659.0) == pytest.approx(62)


def test_records_of_earlier_versions_have_no_times() -> None:
    kept = {
        name: value
        for name, value in json.loads(record(0, 5.0).to_json()).items()
        if name not in ("at", "spent")
    }
    clock = Clock()
    clock.add(CommitRecord.from_json(json.dumps(kept).encode()))
    clock.add(record(1, None, None, generation=2))
    line = clock.timeline()
    assert (line.known, line.unknown, line.retried_units, line.rows_per_s) == (0, 2, 1, 0.0)


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def media_job(folder: Path, **media: object) -> Job:
    (folder / "model").mkdir(exist_ok=True)
    return Job(
        model=str(folder / "model"), input=[str(folder / "in.parquet")], output=str(folder / "out"),
        task=TaskConfig(kind="choose", prompt="What?", image="image", labels=["a", "b"]),
        commit=CommitSection(unit_rows=10), media=MediaSection(**media),  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_small_image_comes_back_as_it_was(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3))
    sources = [
        encoded(image),
        b"no image",
        "https://example.org/a.png?token=secret",
        "../outside.png",
        None,
    ]
    parts = [MediaPart(kind="image", source=source) for source in sources]
    good, *bad = pictures(media_job(tmp_path, root=str(tmp_path)), parts)
    ((url, caption),) = good.frames
    assert (good.size, caption) == ("64 x 48", "")
    shown = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    )
    np.testing.assert_array_equal(shown, image)
    assert all(each.problem and not each.frames for each in bad)
    assert "secret" not in bad[1].problem


def test_pictures_of_rows_stand_in_the_page(tmp_path: Path) -> None:
    job = media_job(tmp_path)
    images = [encoded(np.full((300, 400, 3), 90)), b"broken"]
    rows = pa.table({"id": ["a", "b"], "image": images})
    answers = [chosen([0.9, 0.1], ["a", "b"]), {"error_code": "bad_image"}]
    found = [
        attributes
        for tag, attributes in page_of(commit_rows(job, rows, answers), job).elements
        if tag == "img"
    ]
    assert found
    assert all((each["src"] or "").startswith("data:image/jpeg;base64,") for each in found)
    assert all("of row" in (each["alt"] or "") for each in found)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, span: float, wanted: int) -> None:
    high = low + span
    found = charts.ticks(low, high, wanted)
    slack = span * 1e-6 + 1e-9
    assert all(low - slack <= value <= high + slack for value in found)
    assert len(found) <= wanted + 2


def test_charts_are_well_formed_and_described() -> None:
    for svg in (
        charts.histogram([(3, 1, 0), (0, 0, 0)], [0, 0.5, 1], title="a", x_name="b"),
        charts.reliability([(0.5, 0.4, 0.2, 0.6, 7)], title="a"),
        charts.throughput(
            [0, 1, 2], [5, 0], title="a", mean=2.5, pauses=[(1, "paused")], stalls=[(1, 2)]
        ),
        charts.scatter(
            [charts.Point(x=2, y=0.5, low=0.4, high=0.6, name="A", group=3)],
            title="a",
            x_name="",
            y_name="",
        ),
    ):
        root = ElementTree.fromstring(svg)
        assert [each.tag for each in root][:2] == ["title", "desc"]
        assert root[0].text
        assert root[1].text
        numbers = [
            value
            for each in root.iter()
            for name, value in each.items()
            if name in ("x", "y", "width", "cy")
        ]
        assert all(np.isfinite(float(value)) for value in numbers)


def test_numbers_for_people() -> None:
    assert [compact(n) for n in (0, 9.876, 950, 1234, 99_960, 5_600_000)] == [
        "0",
        "9.88",
        "950",
        "1.2k",
        "100k",
        "5.6M",
    ]
    assert [percent(x) for x in (0, 1e-5, 0.0123, 0.5, 0.9999, 1)] == [
        "0 %",
        "< 0.1 %",
        "1.2 %",
        "50.0 %",
        "> 99.9 %",
        "100 %",
    ]
    assert [duration(s) for s in (2.43, 200, 18_120, 273_600)] == [
        "2.4 s",
        "3 min 20 s",
        "5 h 02 min",
        "3 d 4 h",
    ]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Ten times the units, each as large as before: the peak stays, but for some bytes a unit."""
    peaks = []
    for units in (5, 50):
        folder = tmp_path / str(units)
        folder.mkdir()
        job = choose_job(folder)
        object.__setattr__(job, "commit", CommitSection(unit_rows=200))
        rows = pa.table(
            {
                "id": list(range(200 * units)),
                "text": ["t"] * 200 * units,
                "gold": ["red"] * 200 * units,
            }
        )
        output = commit_rows(job, rows, [chosen([0.5, 0.3, 0.2])] * 200 * units)
        page_of(output, job)  # what is imported and cached on the way counts for neither
        tracemalloc.start()
        page_of(output, job)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.5 + 200_000
