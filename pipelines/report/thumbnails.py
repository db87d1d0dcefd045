"""Small pictures of a row's media as data: URLs, decoded in the process that jobs use for hostile
bytes.

Images and clips come through glm_actors.media.media_loader under the job's own rules for paths;
nothing is fetched: a URL is only named. Owns sizes and how patches become a picture again. Knows
nothing of pages.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.glm_actors.media.media_source import url_of
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.errors import ConfigError, EngineError
from glm_batch.models.processing.messages import MediaPart
from glm_batch.models.processing.patches import Frame, MediaPatches
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.job_media import media_rules

SIDE = 168
FRAMES = 4
PATCH = 8
JPEG_FROM = 96 * 96  # smaller pictures are drawings more often than not, and stay as they are
DECODE_S = 20.0
MAX_MEDIA = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What to show of an image or a clip: pictures as data: URLs with captions, or in `problem` why
    there is none.
    """

    kind: str
    frames: tuple[tuple[str, str], ...] = ()
    size: str = ""
    problem: str = ""


def pictures(job: Job, parts: Sequence[MediaPart]) -> list[Picture]:
    """One for each part, in order. Only the first MAX_MEDIA are decoded; the others are named."""
    near = [place for place, part in enumerate(parts) if url_of(part.source) is None][:MAX_MEDIA]
    found = [Picture(kind=part.kind, problem=_named(part)) for part in parts]
    if not near:
        return found
    try:
        with closing(_loader(job)) as loader:
            results = loader.load([(parts[place].kind, parts[place].source) for place in near])
    except EngineError as error:
        return [replace(each, problem=str(error)) for each in found]
    for place, result in zip(near, results, strict=True):
        shown = _picture(result) if isinstance(result, MediaPatches) else None
        found[place] = shown or Picture(
            kind=parts[place].kind, problem=getattr(result, "message", "")
        )
    return found


def frames(media: MediaPatches) -> list[Frame]:
    """The pictures that patches of PATCH x PATCH were cut from, after resizing; the order of
    PatchWriter, undone.
    """
    groups, height, width = media.grid
    cut = media.patches.reshape(groups, height, width, 3, -1, PATCH, PATCH)
    whole = cut.transpose(0, 4, 1, 5, 2, 6, 3)  # groups, frames, height, PATCH, width, PATCH, 3
    return list(np.ascontiguousarray(whole).reshape(-1, height * PATCH, width * PATCH, 3))


def _loader(job: Job) -> MediaLoader:
    """Patches that are as small as can be, so that pictures keep their shape; Pillow's filter needs
    no torch.
    """
    image = ImageProcessorConfig(
        min_pixels=PATCH * PATCH,
        max_pixels=SIDE * SIDE,
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=1,
        resampling="pil",
    )
    own = {
        name: getattr(image, name)
        for name in ("min_pixels", "patch_size", "merge_size", "resampling")
    }
    fps = job.preprocess.fps or _checkpoint_fps(job.model)
    # All sampled frames share a budget; a long clip must not make its frames too small to see.
    video = VideoProcessorConfig(
        **own, temporal_patch_size=2, max_pixels=SIDE * SIDE * 200, fps=fps
    )
    rules = replace(media_rules(job), hosts=(), private_hosts=(), decode_timeout_s=DECODE_S)
    return MediaLoader(rules, image, video)


def _checkpoint_fps(model_dir: str) -> float:
    try:
        return VideoProcessorConfig.from_dir(model_dir).fps
    except (ConfigError, OSError):
        return VideoProcessorConfig().fps


def _picture(media: MediaPatches) -> Picture:
    _, height, width = media.source
    if media.kind == "image":
        return Picture(
            kind="image", frames=((_data_url(frames(media)[0]), ""),), size=f"{width} x {height}"
        )
    # the first frame of each group has a time
    shown = [_data_url(frame) for frame in frames(media)[::2][:FRAMES]]
    times = [f"{second:.1f} s" for second in media.timestamps[:FRAMES]]
    of_all = (
        f", first {len(shown)} of {media.source[0]} frames taken"
        if media.source[0] > len(shown)
        else ""
    )
    return Picture(
        kind="video",
        frames=tuple(zip(shown, times, strict=True)),
        size=f"{width} x {height}{of_all}",
    )


def _data_url(frame: Frame) -> str:
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE))
    kind = "png" if image.width * image.height < JPEG_FROM else "jpeg"
    stream = io.BytesIO()
    image.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _named(part: MediaPart) -> str:
    url = url_of(part.source)
    return (
        f"not fetched: {url.partition('?')[0]}"
        if url
        else "not decoded: there are many media on this page"
    )
