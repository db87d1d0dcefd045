"""Links lead somewhere, files that are named exist, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from glm_batch.jobs.__main__ import app
from tests.docs.pages import PAGES, ROOT, prose

MOST_LINES = 180
LINK = re.compile(r"\]\(([^)#]+)?(?:#([\w-]+))?\)")
# Names of files of this repository, told from other words in backticks by their first folder.
NAMED = re.compile(
    r"`((?:models|glm_actors|pipelines|jobs|tests|examples|benchmarks|docs)(?:/[\w.-]+)*/?)`"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    for target, _ in LINK.findall(prose(page)):
        if target and not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
    for name in NAMED.findall(prose(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:]}
    assert listed == pages


def test_the_readme_tells_of_every_command() -> None:
    named = set(re.findall(r"glm-batch (\w+)", (ROOT / "README.md").read_text()))
    assert named >= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_LINES
    commands = re.findall(r"^(make \w+|pip install|glm-batch \w+)", "\n".join(lines), re.M)
    assert commands[:4] == ["make demo", "make test", "pip install", "glm-batch demo"]


def test_the_glossary_names_classes_of_the_code() -> None:
    folders = ("models", "glm_actors", "pipelines", "jobs")
    code = "\n".join(
        path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")
    )
    defined = set(re.findall(r"^class (\w+)", code, re.M))
    text = (ROOT / "docs/glossary.md").read_text()
    named = re.findall(r"\| `(\w+)` \|$", text, re.M)
    assert named
    assert set(named) <= defined
