"""Prompts with media as the engine takes them: expanded ids and positions, and checkpoints whose
files contradict.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import MediaPrompts
from glm_batch.models.processing.tokenizer import Tokenizer
from tests.models.media_cases import TEXT, VISION, rope_index

NAMES = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
Folder = Callable[..., str]


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Folder:
    """folder(processor={...}, image_token_id=...) -> a GLM-4.1V's files without weights."""

    def make(
        processor: dict[str, Any] | None = None, video: dict[str, Any] | None = None, **ids: int
    ) -> str:
        source = checkpoint("glm41v")
        tokenizer = Tokenizer.from_dir(str(source))
        right = {name: tokenizer.encode_control(token)[0] for name, token in NAMES.items()}
        config = transformers.Glm4vConfig(
            text_config=TEXT | {"vocab_size": 1024},
            vision_config=VISION | {"patch_size": 14},
            **(right | ids),
        )
        config.architectures = ["Glm4vForConditionalGeneration"]
        config.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        (tmp_path / "chat_template.jinja").write_bytes(
            (source / "chat_template.jinja").read_bytes()
        )
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor or {}))
        if video:
            (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
        return str(tmp_path)

    return make


def load(path: str) -> tuple[Chat, MediaPrompts]:
    chat = Chat.from_dir(path)
    return chat, MediaPrompts.from_dir(path, chat.tokenizer)


def patches(grid: tuple[int, int, int], seconds: tuple[float, ...] = ()) -> MediaPatches:
    kind: Any = "video" if seconds else "image"
    values = np.zeros((int(np.prod(grid)), 588 * (2 if seconds else 1)), np.uint8)
    digest = f"{hash((grid, seconds)) % 2**64:032x}"
    return MediaPatches(
        kind=kind, patches=values, grid=grid, digest=digest, source=(1, 1, 1), timestamps=seconds
    )


def test_images_and_videos_mixed_stand_as_written_by_hand(folder: Folder) -> None:
    chat, prompts = load(folder())
    shown = [
        patches((1, 4, 6)),
        patches((2, 4, 4), (0.0, 1.5)),
        patches((1, 2, 8)),
        patches((1, 4, 6)),
    ]
    parts = [{"type": item.kind, item.kind: item} for item in shown]
    typed = {"type": "text", "text": "<|image|> <|video|>"}
    messages = [
        {
            "role": "user",
            "content": [parts[0], typed, *parts[1:3], {"type": "text", "text": "What?"}],
        },
        {"role": "user", "content": [parts[3]]},
    ]
    ids, media = prompts.place(chat.prompt_ids(messages, thinking=True), shown)

    def control(text: str) -> list[int]:
        return chat.tokenizer.encode_control(text)

    def image(count: int) -> list[int]:
        return control("<|begin_of_image|>" + "<|image|>" * count + "<|end_of_image|>")

    plain = chat.tokenizer.encode
    expected = control("[gMASK]<sop><|user|>\n") + image(6) + plain("<|image|> <|video|>")
    expected += control("<|begin_of_video|>") + image(4) + plain("0") + image(4) + plain("1")
    expected += (
        control("<|end_of_video|>") + image(4) + plain("What?") + control("<|user|>\n") + image(6)
    )
    expected += control("<|assistant|>\n")
    assert ids == expected
    assert media is not None
    assert [item.digest.hex() for item in media.items] == [item.digest for item in shown]
    placeholder = prompts.tokens.image
    begin, end = (
        ids.index(token) for token in (prompts.tokens.video_start, prompts.tokens.video_end)
    )
    types = [(2 if begin < i < end else 1) if id == placeholder else 0 for i, id in enumerate(ids)]
    np.testing.assert_array_equal(media.positions, rope_index(types, list(media.items), merge=2))
    assert media.positions.dtype == np.int64
    assert prompts.num_tokens(shown) == sum(kind > 0 for kind in types) == 24


def test_a_typed_placeholder_expands_to_nothing(folder: Folder) -> None:
    chat, prompts = load(folder())
    item = patches((1, 4, 6))

    def tokens(text: str) -> int:
        parts = [{"type": "text", "text": text}, {"type": "image", "image": item}]
        ids, _ = prompts.place(chat.prompt_ids([{"role": "user", "content": parts}]), [item])
        return ids.count(prompts.tokens.image)

    assert (
        tokens("hello")
        == tokens("<|image|>")
        == tokens("<|begin_of_image|><|image|><|end_of_image|>")
        == 6
    )


def test_text_alone_has_no_media(folder: Folder) -> None:
    chat, prompts = load(folder())
    ids = chat.prompt_ids([{"role": "user", "content": "<|image|>"}])
    assert prompts.place(ids, []) == (ids, None)


@pytest.mark.parametrize("shown", [[], ["image", "image"], ["video"], ["image", "video"]], ids=str)
def test_placeholders_and_media_must_be_as_many(folder: Folder, shown: list[str]) -> None:
    chat, prompts = load(folder())
    ids = chat.prompt_ids([{"role": "user", "content": [{"type": "image", "path": "a"}]}])
    items = [patches((1, 2, 2), (0.0,) if kind == "video" else ()) for kind in shown]
    with pytest.raises(RowError, match=r"the prompt has . (image|video) placeholder") as caught:
        prompts.place(ids, items)
    assert caught.value.code == "media_mismatch"


def test_processors_are_those_of_the_checkpoint(folder: Folder) -> None:
    size = {"shortest_edge": 3136, "longest_edge": 12544}
    _, prompts = load(folder(processor={"size": size}, video={"fps": 1}))
    assert (prompts.image.min_pixels, prompts.image.max_pixels, prompts.video.fps) == (
        3136,
        12544,
        1,
    )


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_differ_are_refused(folder: Folder, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"config\.json: {name} is 3, in tokenizer\.json that token is \d+"
    ):
        load(folder(**{name: 3}))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"processor": {"patch_size": 16}},
            "the image processor has patch_size 16, .* vision_config 14",
        ),
        (
            {"processor": {"merge_size": 1}},
            "the image processor has merge_size 1, .* vision_config 2",
        ),
        (
            {"video": {"temporal_patch_size": 1}},
            "the video processor has temporal_patch_size 1, .* vision_config 2",
        ),
    ],
    ids=str,
)
def test_patches_that_the_model_cannot_take_are_refused(
    folder: Folder, files: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(folder(**files))


def test_a_text_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    transformers.Glm4Config(architectures=["Glm4ForCausalLM"]).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_dir(str(checkpoint("glm41v")))
    with pytest.raises(
        ConfigError, match="Glm4ForCausalLM reads text alone; images and videos need"
    ):
        MediaPrompts.from_dir(str(tmp_path), tokenizer)


def test_a_tokenizer_without_placeholders_is_refused(
    folder: Folder, checkpoint: Callable[[str], Path]
) -> None:
    path = folder()
    with pytest.raises(ConfigError, match=r"tokenizer\.json has no <\|image\|>, <\|video\|>"):
        MediaPrompts.from_dir(path, Tokenizer.from_dir(str(checkpoint("glm4_0414"))))
