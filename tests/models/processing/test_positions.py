"""Placeholders, token types and positions against transformers' GLM-4.1V processor and model."""

from __future__ import annotations

import random
import re
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers.models.glm4v.modeling_glm4v import Glm4vModel
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.video_utils import VideoMetadata

from glm_batch.models.checkpoint.media_config import VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import MediaTokens
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.budget import Grid, sample_frames
from glm_batch.models.processing.positions import (
    VideoSpan,
    expand_placeholders,
    media_token_types,
    rope_positions,
    tokenizer_media_tokens,
)
from glm_batch.models.processing.tokenizer import Tokenizer
from tests.models.processing.conftest import build_tokenizer

IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    library = build_tokenizer()
    library.add_special_tokens(
        [AddedToken(text, normalized=False) for text in ("<|image|>", "<|video|>")]
    )
    return Tokenizer(library)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> MediaTokens:
    return tokenizer_media_tokens(tokenizer)


def expand(
    text: str, tokenizer: Tokenizer, images: list[Grid], videos: list[VideoSpan]
) -> list[int]:
    return expand_placeholders(
        tokenizer.encode_control(text),
        tokens=tokenizer_media_tokens(tokenizer),
        merge_size=2,
        images=images,
        videos=videos,
        encode=tokenizer.encode,
    )


def hf_expand(
    text: str, images: list[Grid], videos: list[Grid], metadata: list[VideoMetadata]
) -> str:
    """The text as the published processor expands it."""
    merge = SimpleNamespace(merge_size=2)
    processor = SimpleNamespace(
        image_processor=merge, video_processor=merge, image_token="<|image|>"
    )
    processor.replace_frame_token_id = partial(Glm4vProcessor.replace_frame_token_id, processor)
    image_inputs = {"image_grid_thw": np.array(images)}
    video_inputs = {"video_grid_thw": np.array(videos), "video_metadata": metadata}
    image_texts = (
        Glm4vProcessor.replace_image_token(processor, image_inputs, k) for k in range(len(images))
    )
    video_texts = (
        Glm4vProcessor.replace_video_token(processor, video_inputs, k) for k in range(len(videos))
    )
    return re.sub(
        r"<\|(image|video)\|>",
        lambda match: next(image_texts if match[1] == "image" else video_texts),
        text,
    )


def random_media(chance: random.Random) -> tuple[str, list[Grid], list[Grid], list[VideoMetadata]]:
    """A prompt with text, images and videos in any order, the grids of both, and the videos'
    metadata.
    """
    text, images, videos, metadata = "", [], [], []
    for _ in range(chance.randint(1, 8)):
        kind = chance.choice(["text", "image", "video"])
        size = (2 * chance.randint(1, 5), 2 * chance.randint(1, 5))
        if kind == "text":
            text += chance.choice(["Which shape?", " 12 circles\n", "你好", "7"])
        elif kind == "image":
            text += IMAGE
            images.append((1, *size))
        else:
            text += VIDEO
            total, fps = chance.randint(1, 90), chance.choice([4.0, 8.0, 24.0, 29.97])
            indices = sample_frames(total, fps, VideoProcessorConfig(), duration_s=total / fps)
            videos.append((len(indices) // 2, *size))
            metadata.append(VideoMetadata(total_num_frames=total, fps=fps, frames_indices=indices))
    return text + "?", images, videos, metadata


def spans_of(videos: list[Grid], metadata: list[VideoMetadata]) -> list[VideoSpan]:
    return [
        VideoSpan(grid=grid, timestamps=[index / clip.fps for index in clip.frames_indices[::2]])
        for grid, clip in zip(videos, metadata, strict=True)
    ]


def hf_positions(
    types: list[int], images: list[Grid], videos: list[Grid], padding: int = 0
) -> tuple[np.ndarray, int]:
    """Positions and rope_delta by the published model, for a prompt with `padding` tokens before
    it.
    """
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    )
    model.get_vision_position_ids = MethodType(Glm4vModel.get_vision_position_ids, model)
    padded = torch.tensor([[0] * padding + types])
    positions, delta = Glm4vModel.get_rope_index(
        model,
        input_ids=torch.ones_like(padded),
        mm_token_type_ids=padded,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        attention_mask=torch.tensor([[0] * padding + [1] * len(types)]),
    )
    return positions[:, 0, padding:].numpy(), int(delta)


def error_of(code: str) -> Any:
    return pytest.raises(RowError, match=re.escape(f"[{code}]"))


def test_everything_equals_transformers_on_random_prompts(
    tokenizer: Tokenizer, tokens: MediaTokens
) -> None:
    chance = random.Random(0)
    oracle = SimpleNamespace(
        image_token_id=tokens.image,
        video_start_id=tokens.video_start,
        video_end_id=tokens.video_end,
    )
    for _ in range(150):
        text, images, videos, metadata = random_media(chance)
        ids = expand(text, tokenizer, images, spans_of(videos, metadata))
        assert ids == tokenizer.encode_control(hf_expand(text, images, videos, metadata))
        types = media_token_types(ids, tokens)
        assert types.tolist() == Glm4vProcessor.create_mm_token_type_ids(oracle, [ids])[0]
        positions, delta = rope_positions(types, merge_size=2, images=images, videos=videos)
        expected, expected_delta = hf_positions(
            types.tolist(), images, videos, padding=chance.choice([0, 3])
        )
        assert np.array_equal(positions, expected)
        assert delta == expected_delta


def test_the_published_expansion_of_a_clip(tokenizer: Tokenizer) -> None:
    """24 frames of 120x200 at 8 a second."""
    clip = VideoSpan(grid=(3, 8, 14), timestamps=[0.0, 1.0, 2.0])
    frame = "<|begin_of_image|>" + "<|image|>" * 28 + "<|end_of_image|>"
    expected = f"<|begin_of_video|>{frame}0{frame}1{frame}2<|end_of_video|>"
    assert expand(VIDEO, tokenizer, [], [clip]) == tokenizer.encode_control(expected)


def test_seconds_are_cut_and_not_rounded(tokenizer: Tokenizer) -> None:
    ids = expand(VIDEO, tokenizer, [], [VideoSpan(grid=(2, 2, 2), timestamps=[0.99, 11.75])])
    assert tokenizer.decode(ids) == "011"


def test_the_published_positions_of_a_clip() -> None:
    """Two tokens of text, a video of three groups of 3x4 tokens between its markers, four tokens of
    text.
    """
    frame = [0, *[2] * 12, 0, 0]  # begin, tokens, end, timestamp
    types = [0, 0, 0, *frame * 3, 0, 0, 0, 0, 0]
    positions, delta = rope_positions(types, merge_size=2, images=[], videos=[(3, 6, 8)])
    time = [0, 1, 2, 3, *[4] * 12, 8, 9, 10, *[11] * 12, 15, 16, 17, *[18] * 12, *range(22, 29)]
    assert positions[0].tolist() == time
    assert positions[1, 4:16].tolist() == [4] * 4 + [5] * 4 + [6] * 4
    assert positions[2, 4:16].tolist() == [4, 5, 6, 7] * 3
    assert delta == -24


def test_text_alone_counts_up() -> None:
    positions, delta = rope_positions([0] * 5, merge_size=2, images=[], videos=[])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert delta == 0


def test_the_next_token_goes_on_after_the_media() -> None:
    """A longer prompt's last position is what rope_delta promises for the shorter one's next token."""
    types = [0, *[1] * 15, 0]
    _, delta = rope_positions(types, merge_size=2, images=[(1, 6, 10)], videos=[])
    longer, _ = rope_positions([*types, 0], merge_size=2, images=[(1, 6, 10)], videos=[])
    assert longer[:, -1].tolist() == [len(types) + delta] * 3


def test_other_merge_sizes(tokenizer: Tokenizer, tokens: MediaTokens) -> None:
    ids = expand_placeholders(
        [tokens.image],
        tokens=tokens,
        merge_size=1,
        images=[(1, 3, 5)],
        videos=[],
        encode=tokenizer.encode,
    )
    assert ids == [tokens.image] * 15
    positions, delta = rope_positions([1] * 15, merge_size=1, images=[(1, 3, 5)], videos=[])
    assert positions.max(axis=1).tolist() == [0, 2, 4]
    assert delta == 5 - 15


@pytest.mark.parametrize(
    ("text", "num_images", "num_videos"),
    [
        (IMAGE, 0, 0),
        (IMAGE, 2, 0),
        ("none", 1, 0),
        (VIDEO, 0, 0),
        (VIDEO, 1, 1),
        (IMAGE + VIDEO, 1, 0),
    ],
)
def test_placeholders_and_media_must_be_as_many(
    text: str, num_images: int, num_videos: int, tokenizer: Tokenizer
) -> None:
    clips = [VideoSpan(grid=(1, 2, 2), timestamps=[0.0])] * num_videos
    with error_of("media_mismatch"):
        expand(text, tokenizer, [(1, 2, 2)] * num_images, clips)


def test_a_group_needs_its_timestamp(tokenizer: Tokenizer) -> None:
    with error_of("media_mismatch"):
        expand(VIDEO, tokenizer, [], [VideoSpan(grid=(2, 2, 2), timestamps=[0.0])])


@pytest.mark.parametrize(
    ("types", "images", "videos"),
    [
        ([0, 1, 1, 0], [(1, 2, 2)], []),  # the run is too long
        ([0, 1, 0], [], []),  # no grid
        ([0, 1, 0], [], [(1, 2, 2)]),  # a grid of the other kind
        ([0, 1, 0], [(1, 2, 2), (1, 2, 2)], []),  # one grid too many
        ([0, 2, 0], [], [(2, 2, 2)]),  # the second group is missing
        ([0, 1, 1, 0], [(1, 2, 2), (1, 2, 2)], []),  # two images without a marker between them
    ],
)
def test_runs_must_fit_the_grids(types: list[int], images: list[Grid], videos: list[Grid]) -> None:
    with error_of("media_mismatch"):
        rope_positions(types, merge_size=2, images=images, videos=videos)


def test_an_empty_prompt() -> None:
    with error_of("empty_prompt"):
        rope_positions([], merge_size=2, images=[], videos=[])


def test_a_text_models_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"<\|image\|>, <\|video\|>"):
        tokenizer_media_tokens(Tokenizer(build_tokenizer()))
