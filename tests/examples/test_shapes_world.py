"""Pictures and clips show what their gold answers say, and the shipped shards hold what the job
files promise.
"""

from __future__ import annotations

import colorsys
import io
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import make_shards
import media_files
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from samples import IMAGES, VIDEOS
from shape_tasks import MediaStream, load_prompts, show_clip
from shapes import (
    COLOURS,
    COUNTS,
    HUE_JITTER,
    MOTIONS,
    SHAPES,
    Clip,
    Scene,
    Split,
    clips,
    draw,
    draw_background,
    make_scene,
    scenes,
)

from glm_batch.models.errors import RowError
from glm_batch.models.processing.images import ImageProcessor, decode_image
from glm_batch.models.processing.video import VideoProcessor, scan_video

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def take_scenes(split: Split, number: int, seed: int = 0) -> list[Scene]:
    return list(itertools.islice(scenes(split, seed), number))


def take_clips(split: Split, number: int, seed: int = 0) -> list[Clip]:
    return list(itertools.islice(clips(split, seed), number))


def figure_pixels(scene: Scene) -> np.ndarray:
    """bool [height, width]: where the picture differs clearly from its background."""
    with_figures, without = (
        np.asarray(picture, np.int32) for picture in (draw(scene), draw_background(scene))
    )
    return np.abs(with_figures - without).sum(axis=2) > 60


def count_components(mask: np.ndarray) -> int:
    """Euler's number of figures without holes, whose pixels may touch at corners: counted over
    windows of 2 x 2.
    """
    padded = np.pad(mask, 1).astype(int)
    a, b, c, d = padded[1:, 1:], padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    filled, diagonal = a + b + c + d, (a == d) & (b == c) & (a != b)
    return int((filled == 1).sum() - (filled == 3).sum() - 2 * diagonal.sum()) // 4


def shape_of(mask: np.ndarray) -> str:
    """By the waves of the outline's distance from its centre: three for a triangle, four, five, or
    none.
    """
    y, x = np.nonzero(mask)
    dy, dx = y - y.mean(), x - x.mean()
    bins = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 60).astype(int) % 60
    profile = np.array([np.hypot(dy, dx)[bins == b].max() for b in range(60)])
    waves = np.abs(np.fft.rfft(profile / profile.mean()))[:7] / 60
    best = int(waves[3:6].argmax()) + 3
    return {3: "triangle", 4: "square", 5: "star"}[best] if waves[best] > 0.03 else "circle"


def test_same_seed_gives_the_same_pictures_and_clips() -> None:
    assert take_scenes("train", 50) == take_scenes("train", 50)
    assert take_clips("train", 50) == take_clips("train", 50)
    scene = take_scenes("train", 1)[0]
    np.testing.assert_array_equal(np.asarray(draw(scene)), np.asarray(draw(scene)))


def test_train_and_eval_share_no_picture() -> None:
    drawn = {
        split: {s for seed in range(3) for s in take_scenes(split, 300, seed)}
        for split in ("train", "eval")
    }
    assert len(drawn["train"]) == len(drawn["eval"]) == 900
    assert not drawn["train"] & drawn["eval"]
    moving = {
        split: {c.scene for seed in range(3) for c in take_clips(split, 300, seed)}
        for split in ("train", "eval")
    }
    assert not moving["train"] & moving["eval"]


def test_answers_come_in_fair_shares() -> None:
    sample = take_scenes("train", 3000)
    for found, names in (
        (Counter(scene.shape for scene in sample), SHAPES),
        (Counter(scene.colour for scene in sample), tuple(COLOURS)),
        (Counter(scene.count for scene in sample), COUNTS),
        (Counter(clip.motion for clip in take_clips("train", 3000)), tuple(MOTIONS)),
    ):
        assert set(found) == set(names)
        assert all(0.8 < found[name] * len(names) / 3000 < 1.2 for name in names), found


def test_a_picture_shows_as_many_figures_as_it_says() -> None:
    for scene in take_scenes("eval", 150, seed=1):
        assert count_components(figure_pixels(scene)) == scene.count, scene


def test_a_picture_shows_the_colour_that_it_says() -> None:
    for scene in take_scenes("eval", 150, seed=2):
        fills = np.asarray(draw(scene))[figure_pixels(scene)]
        hue = colorsys.rgb_to_hsv(*(np.median(fills, axis=0) / 255))[0] * 360
        distance = {name: abs((hue - centre + 180) % 360 - 180) for name, centre in COLOURS.items()}
        assert min(distance, key=distance.__getitem__) == scene.colour
        assert distance[scene.colour] < HUE_JITTER + 2


def test_a_picture_shows_the_shape_that_it_says() -> None:
    for scene in take_scenes("eval", 250, seed=3):
        if scene.count == 1 and scene.figures[0].radius > 25:
            assert shape_of(figure_pixels(scene)) == scene.shape, scene


def test_figures_keep_inside_their_picture() -> None:
    for scene in take_scenes("eval", 300):
        for figure in scene.figures:
            assert figure.radius < figure.x < scene.width - figure.radius
            assert figure.radius < figure.y < scene.height - figure.radius


def test_sizes_and_aspect_ratios_vary() -> None:
    sample = take_scenes("eval", 500)
    assert min(min(s.width, s.height) for s in sample) < 90
    assert max(max(s.width, s.height) for s in sample) > 450
    assert min(s.width / s.height for s in sample) < 0.6
    assert max(s.width / s.height for s in sample) > 1.7


def test_a_clip_moves_as_it_says() -> None:
    for clip in take_clips("eval", 60):
        background = np.asarray(draw_background(clip.scene), np.int32)
        moments = [0, clip.num_frames // 2, clip.num_frames - 1]
        frames = [np.asarray(frame, np.int32) for frame in clip.draw(moments)]
        centres = [
            np.argwhere(np.abs(frame - background).sum(axis=2) > 60).mean(axis=0)
            for frame in frames
        ]
        dx, dy = MOTIONS[clip.motion]
        for before, after in itertools.pairwise(centres):
            moved_y, moved_x = after - before
            ahead, aside = moved_x * dx + moved_y * dy, moved_x * abs(dy) + moved_y * abs(dx)
            assert ahead > 3 * abs(aside), (clip, centres)


def test_clips_last_two_to_four_seconds_and_stay_in_the_picture() -> None:
    for clip in take_clips("eval", 200):
        assert 1.9 < clip.num_frames / clip.fps < 4.1
        assert clip.scene.width % 2 == clip.scene.height % 2 == 0
        for index in (0, clip.num_frames // 3, clip.num_frames - 1):
            figure = clip.figure(index)
            assert figure.radius - 1 < figure.x < clip.scene.width - figure.radius + 1
            assert figure.radius - 1 < figure.y < clip.scene.height - figure.radius + 1


def test_files_show_the_picture_that_was_encoded() -> None:
    rng = random.Random(0)
    for scene in take_scenes("eval", 80, seed=4):
        data = media_files.encode_image(draw(scene), rng)
        decoded = decode_image(data, max_source_pixels=1 << 26).astype(np.int32)
        assert decoded.shape == (scene.height, scene.width, 3)
        assert np.abs(decoded - np.asarray(draw(scene))).mean() < 8


def test_a_trained_clip_is_what_the_jobs_make_of_its_file() -> None:
    processor, rng = VideoProcessor(VIDEOS), random.Random(0)
    for clip in take_clips("eval", 12, seed=5):
        trained = show_clip(clip, rng).patches
        shipped = processor.from_bytes(
            media_files.encode_clip(clip.draw(list(range(clip.num_frames))), clip.fps)
        )
        assert trained.grid == shipped.grid
        assert [int(second) for second in trained.timestamps] == [
            int(second) for second in shipped.timestamps
        ]
        assert np.abs(trained.patches.astype(np.int32) - shipped.patches).mean() < 8


def test_hints_stand_where_the_figures_are() -> None:
    stream = MediaStream(split="eval", seed=6, num_images=30, num_clips=10)
    for shown in stream.lot(0):
        centres = shown.hints[:, 0]
        frames = shown.patches.grid[0] if "motion" in shown.answers else 1
        assert len(shown.hints) == len(shown.patches.patches) // IMAGES.merge_size**2
        if "motion" in shown.answers:
            assert centres.sum() == frames
            assert set(shown.hints[centres == 1, 3]) == {
                list(MOTIONS).index(shown.answers["motion"])
            }
        else:
            assert 1 <= centres.sum() <= int(shown.answers["count"])
            assert set(shown.hints[centres == 1, 1]) == {SHAPES.index(shown.answers["shape"])}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("truncated JPEG", "bad_image"),
        ("text", "bad_image"),
        ("zero bytes", "bad_image"),
        ("bomb", "media_too_large"),
    ],
)
def test_broken_images_are_refused(kind: str, code: str) -> None:
    data = media_files.broken_image(kind, draw(make_scene(random.Random(0))))
    with pytest.raises(RowError) as caught:
        ImageProcessor(IMAGES).from_bytes(data or b"")
    assert caught.value.code == code


@pytest.mark.parametrize("kind", [kind for kind in media_files.BROKEN_CLIPS if kind != "null"])
def test_broken_clips_are_refused(kind: str) -> None:
    clip = take_clips("eval", 1)[0]
    data = media_files.broken_clip(kind, clip.draw(list(range(clip.num_frames))), clip.fps)
    with pytest.raises(RowError) as caught:
        VideoProcessor(VIDEOS).from_bytes(data or b"")
    assert caught.value.code == "bad_video"


def read_rows(name: str) -> list[Row]:
    return [
        row
        for path in sorted((ROOT / "examples" / name).iterdir())
        for row in pq.read_table(path).to_pylist()
    ]


@pytest.fixture(scope="module")
def image_rows() -> list[Row]:
    return read_rows("shapes")


@pytest.fixture(scope="module")
def clip_rows() -> list[Row]:
    return read_rows("clips")


def test_media_shards_hold_the_promised_columns_and_stay_small() -> None:
    for name, schema, sizes in (
        ("shapes", make_shards.IMAGE_SCHEMA, make_shards.IMAGE_ROWS),
        ("clips", make_shards.CLIP_SCHEMA, make_shards.CLIP_ROWS),
    ):
        paths = sorted((ROOT / "examples" / name).iterdir())
        assert [pq.read_metadata(path).num_rows for path in paths] == list(sizes)
        assert all(pq.read_schema(path).equals(schema) for path in paths)
        ids = [row["id"] for row in read_rows(name)]
        assert len(set(ids)) == len(ids)
    total = sum(
        path.stat().st_size
        for name in ("shapes", "clips")
        for path in (ROOT / "examples" / name).iterdir()
    )
    assert total < 6_000_000


def test_gold_is_null_exactly_where_an_image_is_broken(image_rows: list[Row]) -> None:
    processor = ImageProcessor(IMAGES)
    broken: Counter[str] = Counter()
    for row in image_rows:
        gold = [row["gold_shape"], row["gold_colour"], row["gold_count"]]
        try:
            processor.from_bytes(row["image"] or b"")
        except RowError as error:
            assert gold == [None] * 3
            broken[error.code] += 1
        else:
            assert None not in gold
    kinds = len(media_files.BROKEN_IMAGES)
    assert broken == {
        "bad_image": make_shards.NUM_BROKEN_IMAGES * (kinds - 1),
        "media_too_large": make_shards.NUM_BROKEN_IMAGES,
    }
    assert sum(row["image"] is None for row in image_rows) == make_shards.NUM_BROKEN_IMAGES


def test_gold_is_null_exactly_where_a_clip_is_broken(clip_rows: list[Row]) -> None:
    broken = 0
    for row in clip_rows:
        try:
            info = scan_video(row["video"] or b"", max_source_pixels=VIDEOS.max_source_pixels)
        except RowError:
            assert row["gold_motion"] is None
            broken += 1
        else:
            assert row["gold_motion"] in MOTIONS
            assert 1.9 < info.num_frames / info.fps < 4.1
    assert broken == make_shards.NUM_BROKEN_CLIPS * len(media_files.BROKEN_CLIPS)


def test_the_generator_writes_the_shipped_images(image_rows: list[Row]) -> None:
    """Other versions of the encoders may write other bytes: what counts are the answers and the
    decoded picture.
    """
    for made, shipped in zip(
        make_shards.make_image_rows(len(image_rows), make_shards.SEED), image_rows, strict=True
    ):
        assert {k: v for k, v in shipped.items() if k != "image" and v is not None} == {
            k: v for k, v in made.items() if k != "image" and v is not None
        }
        if shipped["gold_shape"] is not None:
            pictures = [
                decode_image(row["image"], max_source_pixels=1 << 26) for row in (made, shipped)
            ]
            assert np.abs(pictures[0].astype(np.int32) - pictures[1]).mean() < 2


def test_the_generator_writes_the_shipped_clips(clip_rows: list[Row]) -> None:
    """x264 does not always write the same bytes for the same frames."""
    processor = VideoProcessor(VIDEOS)
    made = make_shards.make_clip_rows(len(clip_rows), make_shards.SEED)
    for new, shipped in itertools.islice(zip(made, clip_rows, strict=True), 25):
        assert (new["id"], new["gold_motion"]) == (shipped["id"], shipped["gold_motion"])
        if shipped["gold_motion"] is not None:
            patches = [
                processor.from_bytes(row["video"]).patches.astype(np.int32)
                for row in (new, shipped)
            ]
            assert np.abs(patches[0] - patches[1]).mean() < 3


def test_images_come_in_three_formats_and_some_turned(image_rows: list[Row]) -> None:
    kinds: Counter[str] = Counter()
    turned = 0
    for row in image_rows:
        if row["gold_shape"] is not None:
            with Image.open(io.BytesIO(row["image"])) as image:
                kinds[str(image.format)] += 1
                turned += image.getexif().get(0x0112, 1) != 1
    assert set(kinds) == {"JPEG", "PNG", "WEBP"}
    assert min(kinds.values()) > 30
    assert turned > 30


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("shape", list(SHAPES)),
        ("colour", None),
        ("count", [str(count) for count in COUNTS]),
        ("motion", list(MOTIONS)),
    ],
)
def test_media_job_files_fit_the_shards(name: str, labels: list[str] | None) -> None:
    job = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    folder, media = ("clips", "video") if name == "motion" else ("shapes", "image")
    rows = read_rows(folder)
    assert sorted(path for pattern in job["input"] for path in ROOT.glob(pattern)) == sorted(
        (ROOT / "examples" / folder).iterdir()
    )
    assert {job["key"], job["task"]["gold"], job["task"][media], *job["carry"]} <= set(rows[0])
    assert job["task"].get("labels") == labels
    assert job["task"]["prompt"] == load_prompts()[name]
    share_of_bad_rows = sum(row[job["task"]["gold"]] is None for row in rows) / len(rows)
    assert share_of_bad_rows < job["max_error_rate"] < 2.5 * share_of_bad_rows
    golds = {row[job["task"]["gold"]] for row in rows} - {None}
    assert golds == set(labels or COLOURS)
