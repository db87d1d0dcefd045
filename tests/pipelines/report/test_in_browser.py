"""Pages in a real browser, at two widths, light and dark: no error, no request, nothing too wide,
and sorting works.

Run by `make test-report`, which needs Chromium; without it these tests fail.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from glm_batch.pipelines.job import CommitSection, Job, TaskConfig
from glm_batch.pipelines.report.sweep_page import render_sweep
from tests.pipelines.report.browser import Tab, chromium
from tests.pipelines.report.test_hostile_text import HOSTILE
from tests.pipelines.report.test_sweep_page import write_sweep
from tests.pipelines.report.world import chosen, commit_rows, html_of

pytestmark = pytest.mark.browser
LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture
def job_page(tmp_path: Path) -> Path:
    """A page with pictures, and a hostile text in each of 1,000 rows."""
    (tmp_path / "model").mkdir()
    labels = ["<script>alert(1)</script>", "b"]
    job = Job(
        model=str(tmp_path / "model"), input=[str(tmp_path / "in.parquet")], output=str(tmp_path / "out"), key="id",
        task=TaskConfig(kind="choose", prompt="{text}", image="image", labels=labels, gold="gold"),
        commit=CommitSection(unit_rows=100),
    )  # fmt: skip
    stream = io.BytesIO()
    Image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save(stream, "png")
    columns = {
        "id": [f"{n} {text}" for n, text in enumerate(HOSTILE)],
        "text": HOSTILE,
        "gold": HOSTILE[::-1],
    }
    rows = pa.table({**columns, "image": [stream.getvalue()] * len(HOSTILE)})
    answers = [
        chosen([0.7, 0.3] if n % 3 else [0.2, 0.8], labels)
        if n % 4
        else {"error_code": text, "error_message": text}
        for n, text in enumerate(HOSTILE)
    ]
    page = tmp_path / "report.html"
    page.write_text(html_of(commit_rows(job, rows, answers), job), encoding="utf-8")
    return page


async def look(tab: Tab, page: Path) -> None:
    """Opens a page in each of LOOKS."""
    for width, scheme in LOOKS:
        await tab.open(page, width=width, scheme=scheme)
        assert tab.troubles() == []
        assert [url for url in tab.requests() if not url.startswith("data:image/")] == [
            page.resolve().as_uri()
        ]
        assert await tab.value("document.documentElement.scrollWidth") <= width
        background = await tab.value("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(245, 246, 249)", "dark": "rgb(14, 18, 24)"}[scheme]


def test_a_job_with_hostile_texts(job_page: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with chromium(tmp_path / "profile") as tab:
            await look(tab, job_page)
            assert await tab.value("document.querySelectorAll('.card img').length") > 0
            widths = "Array.from(document.querySelectorAll('.card img')).every((each) => each.naturalWidth > 0)"
            assert await tab.value(widths)

    asyncio.run(scenario())


def test_the_table_of_a_sweep_sorts(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    page.write_text(render_sweep(write_sweep(tmp_path, ["one", "two", "three"])), encoding="utf-8")
    marks = "Array.from(document.querySelectorAll('table.sortable tbody th')).map((each) => each.textContent).join('')"
    press = "document.querySelectorAll('table.sortable thead button')[{}].click()"

    async def scenario() -> None:
        async with chromium(tmp_path / "profile") as tab:
            await look(tab, page)
            seen = [await tab.value(marks)]
            for column in (1, 1, 0, 0):
                await tab.value(press.format(column))
                seen.append(await tab.value(marks))
            assert seen == ["ABC", "BCA", "ACB", "ABC", "CBA"]
            heading = "document.querySelector('table.sortable thead th').getAttribute('aria-sort')"
            assert await tab.value(heading) == "descending"
            assert tab.troubles() == []

    asyncio.run(scenario())
