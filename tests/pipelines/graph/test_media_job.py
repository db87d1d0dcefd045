"""Whole jobs over images and videos with the echo engine: columns, messages, budgets, and every
kind of bad file.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.pipelines import run
from glm_batch.pipelines.job import EngineSection, Job, MediaSection, PreprocessSection, TaskConfig
from glm_batch.pipelines.planning.plan import HEAVY_UNIT_BYTES, make_plan, survey_input
from tests.bad_media import IMAGES, VIDEOS
from tests.models.media_cases import TEXT, VISION
from tests.models.processing.conftest import write_checkpoint
from tests.models.processing.test_images import encoded, picture
from tests.models.processing.test_prompt import NAMES
from tests.models.processing.test_video import clip

pytestmark = pytest.mark.usefixtures("ray_cluster")

BUDGET = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 28 * 28 * 64}
PHOTO = encoded(picture(112, 140), "JPEG")  # 4 x 5 tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The files of a GLM-4.1V without its weights."""
    folder = write_checkpoint(tmp_path_factory.mktemp("glm4v"), "glm41v")
    tokenizer = Tokenizer.from_dir(str(folder))
    ids = {name: tokenizer.encode_control(token)[0] for name, token in NAMES.items()}
    config = {
        "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v",
        "text_config": TEXT | {"vocab_size": 1024, "model_type": "glm4v_text", "max_position_embeddings": 4096},
        "vision_config": VISION | {"patch_size": 14, "model_type": "glm4v", "in_channels": 3, "spatial_merge_size": 2,
                                   "temporal_patch_size": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": BUDGET}))
    return str(folder)


def job(
    checkpoint: str, folder: Path, table: dict[str, Any] | list[dict[str, Any]], **task: Any
) -> Job:
    if isinstance(table, dict):
        pq.write_table(pa.table(table), folder / "in.parquet")
    else:
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    default: dict[str, Any] = {"kind": "generate", "prompt": "What is it?"}
    return Job(
        model=checkpoint,
        input=[str(folder / "in.*")],
        output=str(folder / "out"),
        task=TaskConfig(**(default | task)),
        engine=EngineSection(kind="echo"),
    )


def rows(a_job: Job) -> list[dict[str, Any]]:
    return [row for table in run(a_job).iter_tables() for row in table.to_pylist()]


def shown(part: tuple[str, bytes]) -> list[dict[str, Any]]:
    """A conversation about one file, as a Parquet column of messages holds it: absent fields are
    null.
    """
    kind, data = part
    source = {"bytes": data, "path": None}
    fields = {"text": None, "image": None, "video": None}
    return [
        {
            "role": "user",
            "content": [
                fields | {"type": kind, kind: source},
                fields | {"type": "text", "text": "?"},
            ],
        }
    ]


def test_every_bad_image_and_video_in_one_job(checkpoint: str, tmp_path: Path) -> None:
    kinds = [("image", name, make(), code) for name, make, code in IMAGES]
    kinds += [("video", name, make(), code) for name, make, code in VIDEOS]
    kinds = [
        (kind, name, data, code) for kind, name, data, code in kinds if isinstance(data, bytes)
    ]
    assert len(kinds) == len(IMAGES) + len(VIDEOS) - 3  # nulls and a number are no bytes
    chats = [shown((kind, data)) for kind, _, data, _ in kinds]
    found = rows(job(checkpoint, tmp_path, {"chat": chats}, prompt=None, messages="chat"))
    assert {
        name: row["error_code"] or "ok" for (_, name, _, _), row in zip(kinds, found, strict=True)
    } == {name: code for _, name, _, code in kinds}
    assert all((row["media_tokens"] or 0) > 0 for row in found if row["status"] == "ok")


def test_bytes_paths_structs_and_data_urls_are_the_same_image(
    checkpoint: str, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "a.jpg").write_bytes(PHOTO)
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    url = "data:image/jpeg;base64," + base64.b64encode(PHOTO).decode()
    media = MediaSection(root=str(root))
    by_bytes = rows(job(checkpoint, tmp_path, {"photo": [PHOTO]}, image="photo"))[0]
    for number, cells in enumerate(
        [
            [
                "a.jpg",
                str(root / "a.jpg"),
                url,
                "../secret.jpg",
                "missing.jpg",
                "https://example.org/a.jpg",
            ],
            [
                {"bytes": None, "path": "a.jpg"},
                {"bytes": PHOTO, "path": "b.jpg"},
                {"bytes": None, "path": None},
            ],
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = rows(replace(job(checkpoint, folder, {"photo": cells}, image="photo"), media=media))
        good = [row for row in found if row["status"] == "ok"]
        assert {row["text"] for row in good} == {by_bytes["text"]}
        assert {row["media_tokens"] for row in good} == {20}
        codes = [row["error_code"] for row in found]
        assert codes == (
            [None, None, None, "media_forbidden", "media_not_found", "media_forbidden"]
            if number == 0
            else [None, None, "null_media"]
        )


def test_lists_give_several_and_images_come_before_videos(checkpoint: str, tmp_path: Path) -> None:
    table = {
        "photos": pa.array(
            [[PHOTO, encoded(picture(56, 56), "PNG")], [PHOTO, None], []], pa.list_(pa.binary())
        ),
        "clip": [clip(8), clip(8), clip(8)],
    }
    several, null, none = rows(job(checkpoint, tmp_path, table, image="photos", video="clip"))
    assert several["status"] == "ok"
    assert several["text"].count(" image ") == 2
    assert several["text"].index(" image ") < several["text"].index(" video ")
    assert (null["error_code"], none["error_code"]) == ("null_media", "null_media")


def test_messages_in_jsonl_show_images_in_openai_spelling(checkpoint: str, tmp_path: Path) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(PHOTO).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    chats = [
        [{"role": "user", "content": [part, {"type": "text", "text": "<|image|> What?"}]}],
        [{"role": "assistant", "content": [part]}],
        [{"role": "user", "content": "only text"}],
    ]
    good, bad, text = rows(
        job(checkpoint, tmp_path, [{"chat": chat} for chat in chats], prompt=None, messages="chat")
    )
    assert (good["status"], good["media_tokens"]) == ("ok", 20)
    assert bad["error_code"] == "bad_messages"
    assert (text["status"], text["media_tokens"]) == ("ok", 0)


def test_a_smaller_budget_costs_fewer_tokens_and_names_another_job(
    checkpoint: str, tmp_path: Path
) -> None:
    whole = job(checkpoint, tmp_path, {"photo": [PHOTO]}, image="photo")
    small = replace(
        whole, preprocess=PreprocessSection(max_pixels=4 * 28 * 28), output=str(tmp_path / "small")
    )
    assert rows(whole)[0]["media_tokens"] == 20
    assert rows(small)[0]["media_tokens"] <= 4
    assert small.preprocess != whole.preprocess


def test_frames_are_taken_at_the_jobs_rate(checkpoint: str, tmp_path: Path) -> None:
    table = {"clip": [clip(48, 12)]}  # 4 seconds
    slow = job(checkpoint, tmp_path, table, video="clip")
    fast = replace(slow, preprocess=PreprocessSection(fps=4.0), output=str(tmp_path / "fast"))
    assert rows(fast)[0]["media_tokens"] == 2 * rows(slow)[0]["media_tokens"]


def test_a_prompt_too_long_by_its_images_says_so(checkpoint: str, tmp_path: Path) -> None:
    a_job = job(checkpoint, tmp_path, {"photo": [PHOTO]}, image="photo")
    (row,) = rows(replace(a_job, engine=EngineSection(kind="echo", max_model_len=24)))
    assert row["error_code"] == "prompt_too_long"
    assert "20 of them for media: lower preprocess.max_pixels" in row["error_message"]


def test_units_of_large_images_have_few_rows(checkpoint: str, tmp_path: Path) -> None:
    """A unit travels as one block, so what its images weigh bounds its rows."""
    photo = encoded(picture(112, 112), "PNG")
    a_job = job(checkpoint, tmp_path, {"photo": [photo] * 5000}, image="photo")
    survey = survey_input(a_job)
    patches = 16 * 28 * 28 * 3
    assert make_plan(a_job, survey, {}).unit_rows == min(
        HEAVY_UNIT_BYTES // max(patches, len(photo)), 5000 // 32
    )
    wide = replace(
        a_job, preprocess=PreprocessSection(min_pixels=28 * 28 * 4096, max_pixels=28 * 28 * 4096)
    )
    assert make_plan(wide, survey, {}).unit_rows == HEAVY_UNIT_BYTES // (4096 * 28 * 28 * 3)


def test_a_classifier_and_vectors_over_images(checkpoint: str, tmp_path: Path) -> None:
    """The prompt goes through the chat template, which places the image, though these kinds take
    raw text otherwise.
    """
    table = {"photo": [PHOTO, PHOTO[:100]]}
    embedded = rows(job(checkpoint, tmp_path, table, kind="embed", image="photo"))
    folder = tmp_path / "classifier"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Glm4vForSequenceClassification"],
        "id2label": {"0": "cat", "1": "dog", "2": "owl"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    a_job = job(str(folder), tmp_path, table, kind="classify", image="photo")
    classified = rows(replace(a_job, output=str(tmp_path / "classified")))
    for good, bad in (embedded, classified):
        assert (good["status"], good["media_tokens"]) == ("ok", 20)
        assert bad["error_code"] == "bad_image"
    assert classified[0]["label"] in ("cat", "dog", "owl")
