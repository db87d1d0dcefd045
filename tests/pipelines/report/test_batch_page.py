"""The page of an OpenAI batch file's answers: bodies that clients sent, and errors, none of which
may run.
"""

from __future__ import annotations

from pathlib import Path

from glm_batch.jobs.report.report import Wanted, kept_job, report
from glm_batch.pipelines.job import CommitSection
from glm_batch.pipelines.output.commit import Output
from tests.pipelines.openai_batch.batch_files import answer_all, line, make_job, write_lines
from tests.pipelines.report.test_hostile_text import HOSTILE, check
from tests.pipelines.report.world import Page, page_of

CHAT = "/v1/chat/completions"


def test_a_batch_file_has_a_page(echo_checkpoint: Path, tmp_path: Path) -> None:
    def chat(name: str, text: str, model: str = echo_checkpoint.name) -> dict[str, object]:
        return line(
            name,
            CHAT,
            {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 3},
        )

    hostile = [text for text in HOSTILE[::40] if len(text) < 200]
    lines = [chat(f"{n}-{text}", text) for n, text in enumerate(hostile)]
    write_lines(tmp_path / "requests.jsonl", [*lines, chat("wrong", "x", "nobody"), "no json"])
    job = make_job(echo_checkpoint, tmp_path, commit=CommitSection(unit_rows=4))
    good, bad = answer_all(job)
    output = Output.at(job.output)
    page = page_of(output, kept_job(output))
    check(page)
    assert page.tiles["Rows"] == f"{len(lines) + 2:,}"
    assert page.tiles["Failed"] == "2"
    assert (len(good), len(bad)) == (len(lines), 2)
    for code in ("model_not_found", *(each["error"]["code"] for each in bad if each["error"])):
        assert code in page.text
    report(job.output, Wanted(to=str(tmp_path / "pages")))
    assert "wrong" in Page.read((tmp_path / "pages" / "report.html").read_text()).text
