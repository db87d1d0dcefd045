"""Media of a job: where they may come from, their budgets, and how many bytes a row of them is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from glm_batch.glm_actors.media.media_loader import MediaLoader, MediaRules
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.media_config import (
    NUM_CHANNELS,
    ImageProcessorConfig,
    VideoProcessorConfig,
)
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.budget import image_grid, video_grid
from glm_batch.models.processing.messages import MediaPart, media_parts
from glm_batch.pipelines.job import Job, PreprocessSection
from glm_batch.pipelines.tasks.prompts import PromptTemplate, Row, conversation, media_columns

Config = TypeVar("Config", ImageProcessorConfig, VideoProcessorConfig)
# height and width of what cannot be looked at without fetching or decoding it
ASSUMED_IMAGE = 1080, 1920
ASSUMED_CLIP = 32, 480, 640


def reads_media(job: Job, model_dir: str) -> bool:
    """Whether rows may hold media: in the job's columns, or in messages to a model for them."""
    in_messages = (job.asks_by_row or job.task.messages is not None) and load_config(
        model_dir
    ).vision is not None
    return bool(media_columns(job.task)) or in_messages


def media_loader(job: Job, model_dir: str) -> MediaLoader:
    """Builds what turns cells into patches under the job's rules and budgets."""
    return MediaLoader(media_rules(job), *media_budgets(job.preprocess, model_dir))


def media_rules(job: Job) -> MediaRules:
    """The job's section as the loader takes it."""
    media = asdict(job.media)
    root = media.pop("root")
    hosts, private = tuple(media.pop("hosts")), tuple(media.pop("private_hosts"))
    return MediaRules(
        root=root and os.path.abspath(root), hosts=hosts, private_hosts=private, **media
    )


def media_budgets(
    preprocess: PreprocessSection, model_dir: str
) -> tuple[ImageProcessorConfig, VideoProcessorConfig]:
    """The checkpoint's processors under the job's budgets. Raises ConfigError for useless ones."""
    image, video = (
        ImageProcessorConfig.from_dir(model_dir),
        VideoProcessorConfig.from_dir(model_dir),
    )
    # The published budget counts temporal_patch_size frames for an image; the job's counts its
    # pixels once.
    image = _with_budget(image, preprocess, image.temporal_patch_size)
    video = _with_budget(video, preprocess, 1)
    return image, video if preprocess.fps is None else replace(video, fps=preprocess.fps)


def media_row_bytes(job: Job, rows: Sequence[Row | RowError]) -> float:
    """The mean bytes of media in a row between two stages, from headers alone.

    A row weighs what it holds when it is read or what becomes of it, whichever is more.
    """
    image, video = media_budgets(job.preprocess, job.model)
    template = PromptTemplate.parse(job.task.prompt) if job.task.prompt is not None else None
    sizes = [
        sum(
            max(_encoded_bytes(part), _patch_bytes(part, image, video))
            for part in _row_parts(job, template, row)
        )
        for row in rows
    ]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _with_budget(config: Config, preprocess: PreprocessSection, copies: int) -> Config:
    least, most = preprocess.min_pixels, preprocess.max_pixels
    smallest = config.factor**2
    for key, value in (("min_pixels", least), ("max_pixels", most)):
        if value is not None and value < smallest:
            raise ConfigError(
                f"preprocess.{key}: it is {value}, but one token shows "
                f"{config.factor}x{config.factor} pixels: "
                f"give at least {smallest}"
            )
    if least is not None and most is not None and least > most:
        raise ConfigError(
            f"preprocess.min_pixels: it is {least}, above preprocess.max_pixels, {most}; lower it"
        )
    max_pixels = config.max_pixels if most is None else most * copies
    min_pixels = config.min_pixels if least is None else least * copies
    # A bound that the job sets moves the checkpoint's other one out of its way.
    if least is None:
        min_pixels = min(min_pixels, max_pixels)
    else:
        max_pixels = max(min_pixels, max_pixels)
    return replace(config, min_pixels=min_pixels, max_pixels=max_pixels)


def _row_parts(job: Job, template: PromptTemplate | None, row: Row | RowError) -> list[MediaPart]:
    if isinstance(row, RowError):
        return []
    try:
        if job.asks_by_row:
            return media_parts(_messages(row))
        return media_parts(conversation(job.task, template, row))
    except RowError:
        return []


def _messages(request: Row) -> list[Any]:
    """The conversation in a line of a batch file, if it holds one."""
    body = request.get("body")
    messages = body.get("messages") if isinstance(body, dict) else None
    return messages if isinstance(messages, list) else []


def _encoded_bytes(part: MediaPart) -> int:
    data = _inline(part)
    return len(data) if isinstance(data, bytes | str) else 0


def _patch_bytes(part: MediaPart, image: ImageProcessorConfig, video: VideoProcessorConfig) -> int:
    try:
        if part.kind == "video":
            return (
                math.prod(video_grid(*ASSUMED_CLIP, video))
                * video.temporal_patch_size
                * _frame_values(video)
            )
        return math.prod(image_grid(*_image_size(part, image), image)) * _frame_values(image)
    except RowError:
        return 0


def _frame_values(config: ImageProcessorConfig) -> int:
    """Bytes of one patch of a single frame."""
    return NUM_CHANNELS * config.patch_size**2


def _image_size(part: MediaPart, config: ImageProcessorConfig) -> tuple[int, int]:
    from glm_batch.models.processing.images import read_image_size

    data = _inline(part)
    return (
        read_image_size(data, max_source_pixels=config.max_source_pixels)
        if isinstance(data, bytes)
        else ASSUMED_IMAGE
    )


def _inline(part: MediaPart) -> object:
    """What the row itself holds of a part: bytes, or the text of a path or URL."""
    return part.source.get("bytes") if isinstance(part.source, dict) else part.source
