"""Images against transformers' GLM-4.1V processors, and what becomes of damaged, hostile and odd
files.
"""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as hf_smart_resize

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.budget import (
    image_grid,
    num_media_tokens,
    smart_resize,
    video_grid,
)
from glm_batch.models.processing.images import ImageProcessor, decode_image, read_image_size
from glm_batch.models.processing.patches import encoded_digest, pixel_values
from tests.models.processing.golden import CASES, DATA, budget, check_values

HUB = ImageProcessorConfig(min_pixels=12544, max_pixels=9633792)
LIMIT = HUB.max_source_pixels


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, uint8 [height, width, 3]."""
    random_state = np.random.default_rng(seed)
    coarse = random_state.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(np.int16)
    return np.clip(smooth + random_state.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(call: Callable[[], object]) -> RowError:
    with pytest.raises(RowError) as caught:
        call()
    return caught.value


# ---- equal to the published processors ----


@pytest.mark.parametrize(
    "case", CASES["images"], ids=lambda case: f"{case['torch'].removesuffix('_torch')}"
)
@pytest.mark.parametrize("backend", ["torch", "pil"])
def test_recorded_outputs(case: dict[str, Any], backend: Any) -> None:
    config = ImageProcessorConfig(**budget(case), resampling=backend)
    media = ImageProcessor(config).from_array(DATA[f"image{case['image']}"])
    assert list(media.grid) == case["grid_thw"]
    assert media.patches.shape == (case["shape"][0], case["shape"][1] // 2)
    check_values(pixel_values(torch.from_numpy(media.patches), config), case, case[backend])


@pytest.mark.parametrize("size", [(64, 48), (28, 28), (57, 391), (131, 90), (300, 200)])
def test_equal_to_the_pil_class(size: tuple[int, int]) -> None:
    frame = picture(*size)
    config = ImageProcessorConfig(min_pixels=12544, max_pixels=100_000, resampling="pil")
    oracle = Glm4vImageProcessorPil(size={"shortest_edge": 12544, "longest_edge": 100_000})
    expected = oracle(images=[Image.fromarray(frame)], return_tensors="pt")
    media = ImageProcessor(config).from_array(frame)
    assert [list(media.grid)] == expected["image_grid_thw"].tolist()
    values = pixel_values(torch.from_numpy(media.patches), config)
    torch.testing.assert_close(values, expected["pixel_values"], rtol=0, atol=1e-6)


def test_both_backends_agree_where_nothing_is_resized() -> None:
    frame = picture(112, 168)
    torch_patches, pil_patches = (
        ImageProcessor(replace(HUB, resampling=backend)).from_array(frame).patches
        for backend in ("torch", "pil")
    )
    assert np.array_equal(torch_patches, pil_patches)


def test_patches_lie_merge_block_by_merge_block() -> None:
    """Channel 0 holds the low byte of each pixel's raster number and channel 1 the high byte."""
    number = np.arange(56 * 84).reshape(56, 84)
    frame = np.stack([number % 256, number // 256, number * 0], axis=2).astype(np.uint8)
    config = replace(HUB, min_pixels=1)
    patches = ImageProcessor(config).from_array(frame).patches.reshape(-1, 3, 14 * 14)
    first = patches[:, 0, 0] + 256 * patches[:, 1, 0].astype(int)
    assert first[:8].tolist() == [0, 14, 1176, 1190, 28, 42, 1204, 1218]
    values = pixel_values(torch.from_numpy(patches.reshape(len(patches), -1)), config)
    assert torch.equal(values[:, 0:196], values[:, 196:392])


@pytest.mark.parametrize(
    ("num_frames", "size", "max_pixels", "expected"),
    [
        (2, (480, 640), 9633792, (476, 644)),
        (2, (1080, 1920), 9633792, (1092, 1932)),
        (2, (2160, 3840), 9633792, (1624, 2912)),
        (2, (4000, 6000), 9633792, (1792, 2688)),
        (2, (28, 28), 9633792, (84, 84)),
        (2, (10, 10), 9633792, (84, 84)),
        (2, (42, 42), 9633792, (84, 84)),
        (2, (20, 300), 9633792, (28, 420)),
        (2, (70, 98), 9633792, (56, 112)),
        (2, (100, 15000), 9633792, (112, 15008)),
        (16, (1080, 1920), 47040000, (1092, 1932)),
        (600, (1080, 1920), 47040000, (196, 364)),
        (5, (480, 640), 47040000, (476, 644)),
    ],
)
def test_smart_resize_vectors(
    num_frames: int, size: tuple[int, int], max_pixels: int, expected: tuple[int, int]
) -> None:
    assert smart_resize(num_frames, *size, replace(HUB, max_pixels=max_pixels)) == expected


def test_smart_resize_equals_transformers() -> None:
    chance = random.Random(0)
    refused = 0
    for _ in range(3000):
        frames, height, width = (
            chance.randint(2, 600),
            chance.randint(1, 3000),
            chance.randint(1, 3000),
        )
        config = replace(HUB, max_pixels=chance.choice([20_000, 1_000_000, 47_040_000]))
        try:
            expected = hf_smart_resize(
                frames, height, width, 2, 28, config.min_pixels, config.max_pixels
            )
        except ValueError:
            refused += 1
            assert (
                error_of(lambda c=(frames, height, width, config): smart_resize(*c)).code
                == "media_aspect_ratio"
            )
        else:
            assert smart_resize(frames, height, width, config) == expected
    assert refused > 10


def test_tokens_are_known_from_the_size_alone() -> None:
    grid = image_grid(480, 640, HUB)
    assert grid == ImageProcessor(HUB).from_array(picture(480, 640)).grid == (1, 34, 46)
    assert num_media_tokens(grid, HUB.merge_size) == 391
    assert video_grid(5, 480, 640, VideoProcessorConfig()) == (3, 34, 46)


# ---- the checkpoint's files ----


def test_defaults_are_those_of_the_class(tmp_path: Path) -> None:
    config = ImageProcessorConfig.from_dir(tmp_path)
    assert config == ImageProcessorConfig()
    oracle = Glm4vImageProcessorPil()
    assert {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels} == dict(
        oracle.size
    )
    assert (config.patch_size, config.merge_size) == (oracle.patch_size, oracle.merge_size)
    assert config.temporal_patch_size == oracle.temporal_patch_size
    assert [*config.image_mean, *config.image_std] == [*oracle.image_mean, *oracle.image_std]


def test_each_kind_reads_its_own_file(tmp_path: Path) -> None:
    hub = {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub))
    assert ImageProcessorConfig.from_dir(tmp_path) == HUB
    # As in the published class, the image file stands in for a missing video file.
    assert VideoProcessorConfig.from_dir(tmp_path).max_pixels == 9633792
    clip = {"size": {"shortest_edge": 1000, "longest_edge": 50000}, "fps": 1, "max_duration": 60}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(clip))
    video = VideoProcessorConfig.from_dir(tmp_path)
    assert (video.min_pixels, video.max_pixels, video.fps, video.max_duration_s) == (
        1000,
        50000,
        1,
        60,
    )
    both = {"image_processor": {"patch_size": 16}, "video_processor": {"fps": 4}}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    assert ImageProcessorConfig.from_dir(tmp_path) == ImageProcessorConfig(patch_size=16)
    assert VideoProcessorConfig.from_dir(tmp_path) == VideoProcessorConfig(fps=4)


def test_switched_off_steps_are_folded_into_the_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_rescale": false, "do_normalize": false}'
    )
    config = ImageProcessorConfig.from_dir(tmp_path)
    patches = torch.arange(588, dtype=torch.int64).remainder(256).to(torch.uint8)[None]
    assert torch.equal(
        pixel_values(patches, config).view(3, 2, 196)[:, 1], patches.view(3, 196).float()
    )


@pytest.mark.parametrize(
    "values",
    [
        {"do_resize": False},
        {"resample": 2},
        {"size": {"height": 100, "width": 100}},
        {"size": {"shortest_edge": 500, "longest_edge": 400}},
        {"size": {"shortest_edge": "many", "longest_edge": 400}},
        {"patch_size": 0},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"rescale_factor": 0},
        {"image_processor_type": "Qwen2VLImageProcessor"},
    ],
    ids=json.dumps,
)
def test_files_that_mean_something_else_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        ImageProcessorConfig.from_dir(tmp_path)


def test_a_video_processor_that_takes_every_frame_is_refused(tmp_path: Path) -> None:
    """It once was sampled all the same, without a word."""
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text('{"do_sample_frames": true}')
    VideoProcessorConfig.from_dir(tmp_path)
    file.write_text('{"do_sample_frames": false}')
    with pytest.raises(ConfigError, match=r"video_preprocessor_config\.json: do_sample_frames"):
        VideoProcessorConfig.from_dir(tmp_path)


# ---- files that can be read ----


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats(kind: str) -> None:
    frame = picture(60, 90)
    data = encoded(frame, kind, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode_image(data, max_source_pixels=LIMIT)
    assert decoded.shape == frame.shape
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    if kind in ("PNG", "BMP", "WEBP"):
        assert np.array_equal(decoded, frame)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_become_rgb_as_in_the_published_processor(mode: str) -> None:
    image = Image.fromarray(picture(40, 50)).convert(mode)
    decoded = decode_image(encoded(image, "PNG"), max_source_pixels=LIMIT)
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_cmyk() -> None:
    data = encoded(Image.fromarray(picture(40, 50)).convert("CMYK"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, max_source_pixels=LIMIT), expected)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    """Pillow's own conversion makes everything from 256 on white."""
    grey = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(32, 64)
    decoded = decode_image(encoded(grey, "PNG"), max_source_pixels=LIMIT)
    assert np.array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_transparency_drops_away_and_the_colours_under_it_stay() -> None:
    rgba = np.dstack([picture(40, 50), np.zeros((40, 50), np.uint8)])
    assert np.array_equal(
        decode_image(encoded(rgba, "PNG"), max_source_pixels=LIMIT), rgba[..., :3]
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_picture(kind: str) -> None:
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    data = encoded(red, kind, save_all=True, append_images=[blue], duration=100)
    decoded = decode_image(data, max_source_pixels=LIMIT)
    assert decoded.shape == (30, 40, 3)
    assert abs(decoded.astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(40, 64), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, max_source_pixels=LIMIT), expected)
    assert read_image_size(data, max_source_pixels=LIMIT) == expected.shape[:2]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_picture_readable() -> None:
    data = encoded(picture(40, 64), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert decode_image(data, max_source_pixels=LIMIT).shape == (40, 64, 3)


def test_one_pixel() -> None:
    media = ImageProcessor(HUB).from_bytes(encoded(np.full((1, 1, 3), 7, np.uint8), "PNG"))
    assert media.grid == (1, 6, 6)
    assert np.all(media.patches == 7)


def test_read_only_and_strided_arrays() -> None:
    frame = picture(90, 130)
    frozen = np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape)
    mirrored = np.ascontiguousarray(frame[:, ::-1])[:, ::-1]
    for backend in ("torch", "pil"):
        processor = ImageProcessor(replace(HUB, resampling=backend))
        assert len({processor.from_array(same).digest for same in (frame, frozen, mirrored)}) == 1


# ---- files that cannot ----

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'


def _good(kind: str) -> bytes:
    return encoded(picture(120, 160), kind)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: b"", id="zero bytes"),
        pytest.param(lambda: b"hello, this is a text file\n" * 20, id="text"),
        pytest.param(lambda: SVG, id="svg"),
        pytest.param(
            lambda: encoded(Image.new("1", (20000, 20000)), "TIFF", compression="group4"),
            id="tiff bomb",
        ),
        pytest.param(lambda: _good("JPEG2000"), id="jpeg 2000"),
        pytest.param(lambda: _good("ICO"), id="ico"),
        pytest.param(lambda: _good("PPM"), id="ppm"),
        pytest.param(lambda: _good("PDF"), id="pdf"),
        pytest.param(lambda: _good("PNG")[:8], id="signature only"),
        *[
            pytest.param(
                lambda kind=kind, part=part: _good(kind)[: int(len(_good(kind)) * part)],
                id=f"{kind} {part}",
            )
            for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")
            for part in (0.02, 0.5, 0.95)
        ],
    ],
)
def test_unreadable_files_are_row_errors(make: Callable[[], bytes]) -> None:
    data = make()
    error = error_of(lambda: ImageProcessor(HUB).from_bytes(data))
    assert error.code == "bad_image"
    assert "image" in error.message


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG", "WEBP"])
def test_damaged_bytes_give_a_picture_or_a_row_error(kind: str) -> None:
    chance = random.Random(1)
    good = _good(kind)
    outcomes = set()
    for _ in range(60):
        data = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), chance.choice([64, len(data)])))] = (
                chance.randrange(256)
            )
        try:
            outcomes.add(decode_image(bytes(data), max_source_pixels=1 << 20).dtype)
        except RowError as error:
            outcomes.add(error.code)
    assert "bad_image" in outcomes
    assert outcomes <= {np.dtype(np.uint8), "bad_image", "media_too_large"}


def _webp_claiming(kind: bytes, width: int, height: int) -> bytes:
    colours = picture(20, 20)
    image = np.dstack([colours, colours[..., 0]]) if kind == b"VP8X" else colours
    data = bytearray(encoded(image, "WEBP", lossless=kind == b"VP8L"))
    assert data[12:16] == kind
    if kind == b"VP8X":
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        data[21:25] = (width - 1 | height - 1 << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def _bmp_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(20, 20), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: encoded(Image.new("1", (10000, 9000)), "PNG"), id="PNG"),
        pytest.param(
            lambda: encoded(Image.new("1", (20000, 20000)), "PNG"), id="PNG above Pillow's limit"
        ),
        pytest.param(lambda: encoded(Image.new("L", (9000, 9000)), "GIF"), id="GIF"),
        pytest.param(lambda: _webp_claiming(b"VP8X", 16000, 16000), id="WEBP"),
        pytest.param(lambda: _webp_claiming(b"VP8L", 16000, 16000), id="WEBP lossless"),
        pytest.param(lambda: _webp_claiming(b"VP8 ", 16000, 16000), id="WEBP lossy"),
        pytest.param(lambda: _bmp_claiming(30000, 30000), id="BMP"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(
    make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make()
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded")
    )
    error = error_of(lambda: ImageProcessor(HUB).from_bytes(data))
    assert error.code == "media_too_large"
    assert (
        error_of(lambda: read_image_size(data, max_source_pixels=LIMIT)).code == "media_too_large"
    )


def test_the_pixel_limit_is_the_configured_one() -> None:
    data = encoded(picture(100, 100), "PNG")
    assert ImageProcessor(replace(HUB, max_source_pixels=10_000)).from_bytes(data).grid == (1, 8, 8)
    error = error_of(lambda: ImageProcessor(replace(HUB, max_source_pixels=9_999)).from_bytes(data))
    assert (error.code, "100x100" in error.message) == ("media_too_large", True)


def test_extreme_aspect_ratio() -> None:
    data = encoded(np.zeros((10, 15000, 3), np.uint8), "PNG")
    assert error_of(lambda: ImageProcessor(HUB).from_bytes(data)).code == "media_aspect_ratio"


@pytest.mark.parametrize(
    "frame", [np.zeros((9, 9)), np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8)]
)
def test_other_arrays_are_refused(frame: np.ndarray) -> None:
    assert error_of(lambda: ImageProcessor(HUB).from_array(frame)).code == "bad_image"


# ---- digests ----


def test_the_digest_of_an_array_names_its_pixels_and_the_configuration() -> None:
    frame = picture(112, 112)
    digest = ImageProcessor(HUB).from_array(frame).digest
    assert ImageProcessor(HUB).from_array(frame.copy()).digest == digest
    changed = frame.copy()
    changed[50, 50, 1] ^= 1
    turned = np.ascontiguousarray(frame.reshape(56, 224, 3))
    others = [
        ImageProcessor(HUB).from_array(changed).digest,
        ImageProcessor(HUB).from_array(turned).digest,
        ImageProcessor(replace(HUB, image_mean=(0.5, 0.5, 0.5))).from_array(frame).digest,
    ]
    assert len({digest, *others}) == 4


def test_the_digest_of_a_file_names_its_bytes_and_the_configuration() -> None:
    frame = picture(112, 112)
    data = encoded(frame, "PNG")
    media = ImageProcessor(HUB).from_bytes(data)
    assert media.digest == encoded_digest("image", data, HUB)
    assert media.digest == encoded_digest("image", memoryview(bytearray(data)), replace(HUB))
    assert media.digest == encoded_digest("image", io.BytesIO(data), HUB)
    changed = frame.copy()
    changed[50, 50, 1] ^= 1
    others = [
        ImageProcessor(HUB).from_array(frame).digest,
        # the same pixels in other bytes
        ImageProcessor(HUB).from_bytes(encoded(frame, "BMP")).digest,
        ImageProcessor(HUB).from_bytes(encoded(changed, "PNG")).digest,
        ImageProcessor(replace(HUB, max_pixels=50_000)).from_bytes(data).digest,
        ImageProcessor(replace(HUB, resampling="pil")).from_bytes(data).digest,
        encoded_digest("video", data, HUB),
    ]
    assert len({media.digest, *others}) == 7


def test_a_digest_that_is_known_is_taken_over() -> None:
    assert (
        ImageProcessor(HUB).from_bytes(encoded(picture(30, 30), "PNG"), digest="ab" * 32).digest
        == "ab" * 32
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_files_and_views_are_read_as_bytes_are(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(60, 90), kind)
    (tmp_path / "file").write_bytes(data)
    expected = ImageProcessor(HUB).from_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        for source in (file, memoryview(data)):
            media = ImageProcessor(HUB).from_bytes(source)
            assert np.array_equal(media.patches, expected.patches)
            assert media.digest == expected.digest
