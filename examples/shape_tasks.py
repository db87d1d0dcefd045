"""The questions about pictures and clips, and the training batches that answer them.

Owns which questions a picture is asked and what each of its patches shows. Prompts come from the
shipped job files. Pictures go through the files and the processors that the jobs use; of a clip
only the sampled frames are drawn.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from media_files import encode_image
from PIL import Image
from samples import IGNORED, IMAGES, VIDEOS, Batch, make_sample, stack
from shapes import COLOURS, MOTIONS, SHAPES, Clip, Figure, Scene, Split, clips, draw, scenes
from tiny_tokenizer import ChatEncoder

from glm_batch.models.processing.budget import sample_frames
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.video import VideoProcessor

IMAGE_TASKS = ("shape", "colour", "count")
CLIP_TASK = "motion"
# what is told of a patch, beside whether a figure's centre is in it
HINTS = (SHAPES, tuple(COLOURS), tuple(MOTIONS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A picture or a clip as patches, its right answers by task, and its `hints`.

    Hints are [merged patches, 1 + len(HINTS)]: whether a figure's centre lies there (0 or 1), then
    the numbers of the shape, colour and motion of the figure that covers the patch's middle,
    IGNORED where there is none.
    """

    patches: MediaPatches
    answers: dict[str, str]
    hints: npt.NDArray[np.int64]


def load_prompts() -> dict[str, str]:
    """The prompt of each task as its job file spells it."""
    folder = Path(__file__).parent
    return {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text())["task"]["prompt"]
        for name in (*IMAGE_TASKS, CLIP_TASK)
    }


def show_scene(scene: Scene, rng: random.Random) -> Shown:
    """The picture as the jobs would read it from one of the files that it may be kept in."""
    patches = ImageProcessor(IMAGES).from_bytes(encode_image(draw(scene), rng))
    hints = _frame_hints(scene, scene.figures, patches.grid)
    return Shown(
        patches=patches,
        answers={"shape": scene.shape, "colour": scene.colour, "count": str(scene.count)},
        hints=hints,
    )


def show_clip(clip: Clip, rng: random.Random) -> Shown:
    """The clip as the jobs would sample it, each frame with the losses of a JPEG in place of those
    of a video.
    """
    indices = sample_frames(
        clip.num_frames, clip.fps, VIDEOS, duration_s=clip.num_frames / clip.fps
    )
    quality = rng.randrange(40, 95)
    frames = [_with_losses(frame, quality) for frame in clip.draw(indices)]
    patches = VideoProcessor(VIDEOS).from_frames(
        frames, VIDEOS.fps, duration_s=len(frames) / VIDEOS.fps
    )
    hints = [
        _frame_hints(clip.scene, (clip.figure(index),), patches.grid, clip.motion)
        for index in indices[:: VIDEOS.temporal_patch_size]
    ]
    return Shown(patches=patches, answers={CLIP_TASK: clip.motion}, hints=np.concatenate(hints))


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaStream:
    """Pictures and clips in numbered lots, so that several processes can draw them: the same
    number, the same lot.

    Each picture is asked one of `questions`, in which a harder one may stand more than once; all if
    there are none.
    """

    split: Split
    seed: int
    num_images: int
    num_clips: int
    questions: tuple[str, ...] = ()

    def lot(self, number: int) -> list[Shown]:
        """First the pictures, then the clips."""
        rng = random.Random(f"lot {self.split} {self.seed} {number}")
        seed = 1_000_000 * self.seed + number
        shown = [
            show_scene(scene, rng)
            for scene in itertools.islice(scenes(self.split, seed), self.num_images)
        ]
        if self.questions:
            shown = [_with_one_question(item, rng.choice(self.questions)) for item in shown]
        return shown + [
            show_clip(clip, rng)
            for clip in itertools.islice(clips(self.split, seed), self.num_clips)
        ]


def make_batch(
    encoder: ChatEncoder, prompts: dict[str, str], shown: list[Shown]
) -> tuple[Batch, torch.Tensor]:
    """A batch that asks every picture and clip its questions, and the hints of all."""
    samples = [
        make_sample(encoder, (None, prompts[task]), answer, (index, item.patches))
        for index, item in enumerate(shown)
        for task, answer in item.answers.items()
    ]
    hints = np.concatenate([item.hints for item in shown])
    return stack(samples, [item.patches for item in shown]), torch.from_numpy(hints)


def _with_one_question(item: Shown, task: str) -> Shown:
    return replace(item, answers={task: item.answers[task]})


def _frame_hints(
    scene: Scene, figures: Sequence[Figure], grid: tuple[int, int, int], motion: str | None = None
) -> npt.NDArray[np.int64]:
    rows, columns = grid[1] // IMAGES.merge_size, grid[2] // IMAGES.merge_size
    gold = zip(HINTS, (scene.shape, scene.colour, motion), strict=True)
    numbers = [IGNORED if name is None else names.index(name) for names, name in gold]
    height, width = scene.height / rows, scene.width / columns
    y, x = (np.arange(rows)[:, None] + 0.5) * height, (np.arange(columns)[None, :] + 0.5) * width
    hints = np.full((rows, columns, 1 + len(HINTS)), IGNORED)
    hints[..., 0] = 0
    for figure in figures:
        reach = figure.radius + 0.2 * min(height, width)
        hints[np.hypot(y - figure.y, x - figure.x) < reach, 1:] = numbers
        hints[int(figure.y / height), int(figure.x / width)] = [1, *numbers]
    return hints.reshape(rows * columns, -1)


def _with_losses(frame: Image.Image, quality: int) -> npt.NDArray[np.uint8]:
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))
