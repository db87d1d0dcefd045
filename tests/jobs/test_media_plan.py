"""What images cost in a plan, and what they would under smaller budgets, against the published
resizing by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glm_batch.jobs.plans.job_plan import told_apart
from glm_batch.jobs.plans.media_plan import (
    MediaSize,
    media_lines,
    media_note,
    media_tokens,
    smaller_budgets,
)
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.processing.patches import Media, MediaItem, MediaPatches
from glm_batch.models.processing.prompt import Prompt
from glm_batch.pipelines.job import Job, PreprocessSection, TaskConfig
from tests.models.media_cases import IDS, IMAGE, TEXT, VISION

PHOTO = MediaSize(kind="image", source=(1, 480, 640), grid=(1, 34, 46))  # 17 x 23 tokens
CLIP = MediaSize(kind="video", source=(8, 280, 280), grid=(4, 20, 20))  # 4 x 10 x 10 tokens


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("glm4v")
    hub = {"shortest_edge": 12544, "longest_edge": 9633792}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": hub}))
    return Job(
        model=str(folder),
        input=["x"],
        output="o",
        task=TaskConfig(kind="choose", image="photo", prompt="?"),
    )


def test_tokens_are_those_of_the_published_sizes(job: Job) -> None:
    assert media_tokens(job, job.preprocess, [PHOTO, CLIP]) == [17 * 23, 4 * 10 * 10]


def test_smaller_budgets_are_shares_of_the_largest_in_whole_tokens(job: Job) -> None:
    assert smaller_budgets(job, [PHOTO]) == [
        round(17 * 23 * share) * 784 for share in (1 / 2, 1 / 4, 1 / 8)
    ]
    assert smaller_budgets(job, [PHOTO, CLIP])[0] == 400 * 784  # a clip's budget counts every frame


def test_lines_tell_what_a_smaller_budget_saves(job: Job) -> None:
    (name, text), *savings = media_lines(job, [PHOTO] * 3, prompt_tokens=3 * 400)
    assert (name, text.split(":")[0]) == ("media tokens", "98% of the prompt tokens")
    for line, explanation in savings:
        budget = int(line.split("=")[1])
        fewer = 17 * 23 - media_tokens(job, PreprocessSection(max_pixels=budget), [PHOTO])[0]
        assert explanation.startswith(f"would save {fewer / 400:.0%} of the prompt tokens")
    assert [line.split("=")[0].strip() for line, _ in savings] == ["preprocess.max_pixels"] * 3


def test_nothing_is_told_of_a_text_job_or_of_budgets_that_save_nothing(job: Job) -> None:
    assert list(media_lines(job, [], prompt_tokens=10)) == []
    token = MediaSize(kind="image", source=(1, 28, 28), grid=(1, 2, 2))
    tight = replace(job, preprocess=PreprocessSection(min_pixels=784, max_pixels=784))
    assert [name for name, _ in media_lines(tight, [token], prompt_tokens=10)] == ["media tokens"]


def test_a_note_names_what_a_placeholder_stands_for() -> None:
    patches = MediaPatches(
        kind="video",
        patches=np.zeros((4, 1176), np.uint8),
        grid=CLIP.grid,
        digest="",
        source=CLIP.source,
    )
    assert media_note(patches) == ", video 280x280 (8 frames taken)"


def test_prompts_about_different_images_share_only_what_comes_before(tmp_path: Path) -> None:
    config = {"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v"} | IDS
    config |= {
        "text_config": TEXT | {"model_type": "glm4v_text"},
        "vision_config": VISION | {"in_channels": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_config(tmp_path)

    def prompt(digest: bytes) -> Prompt:
        item = MediaItem(
            kind="image", patches=np.zeros((8, 12), np.uint8), grid_thw=(1, 2, 4), digest=digest
        )
        ids = [1, 2, IMAGE, IMAGE, 3]
        return Prompt(
            input_ids=ids, media=Media(items=(item,), positions=np.zeros((3, 5), np.int64))
        )

    one, same, other = (told_apart(prompt(digest), model) for digest in (b"a", b"a", b"b"))
    assert one == same != other
    assert one[:2] == other[:2] == [1, 2]
    assert not set(one[2:4]) & set(other[2:4])
