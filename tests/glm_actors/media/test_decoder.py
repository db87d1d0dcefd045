"""The decoding process dies, hangs and swells for real; its parent goes on with the next item."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from glm_batch.glm_actors.faults.child import INLINE_BYTES
from glm_batch.glm_actors.media.media_loader import Decoder, Setup
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig
from glm_batch.models.errors import EngineError, RowError
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.video import VideoProcessor
from tests.models.processing.test_images import encoded, picture
from tests.models.processing.test_video import SMALL, clip

IMAGE = ImageProcessorConfig(image_mean=(0.5, 0.4, 0.3), max_pixels=1_000_000)
HOSTILE = "tests.glm_actors.media.hostile_decoder"
DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def make() -> Iterator[Callable[..., Decoder]]:
    """make(module, **limits): a decoder."""
    made: list[Decoder] = []

    def get(module: str = "glm_batch.glm_actors.media.media_loader", **limits: Any) -> Decoder:
        values = {"num_bytes": 1 << 28, "timeout_s": 60.0, **limits}
        made.append(Decoder(Setup(image=IMAGE, video=SMALL, **values), module=module))
        return made[-1]

    yield get
    for decoder in made:
        decoder.close()


@pytest.fixture(scope="module")
def real(make: Callable[..., Decoder]) -> Decoder:
    return make()


@pytest.fixture(scope="module")
def hostile(make: Callable[..., Decoder]) -> Decoder:
    return make(HOSTILE, timeout_s=1.0)


def error_of(decoder: Decoder, data: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        decoder.decode("image", data, DIGEST)
    return caught.value


def works(decoder: Decoder, num_bytes: int = 7) -> bool:
    media = decoder.decode("image", bytes(num_bytes), DIGEST)
    return bool(np.all(media.patches == num_bytes % 251))


# ---- equal to decoding here ----


def test_an_image_comes_back_as_it_would_be_here(real: Decoder) -> None:
    data = encoded(picture(100, 130), "PNG")
    expected = ImageProcessor(IMAGE).from_bytes(data)
    media = real.decode("image", data, expected.digest)
    assert np.array_equal(media.patches, expected.patches)
    assert media.patches.dtype == np.uint8
    assert media.patches.flags.writeable == expected.patches.flags.writeable
    assert (media.kind, media.grid, media.source, media.digest, media.timestamps) == (
        "image",
        expected.grid,
        expected.source,
        expected.digest,
        (),
    )


@pytest.mark.parametrize("given", ["bytes", "view", "file"])
def test_a_clip_comes_back_as_it_would_be_here(given: str, real: Decoder, tmp_path: Path) -> None:
    expected = VideoProcessor(SMALL).from_bytes(clip())
    (tmp_path / "clip").write_bytes(clip())
    with (tmp_path / "clip").open("rb") as file:
        file.read(9)  # where it stands does not matter
        data = {"bytes": clip(), "view": memoryview(clip()), "file": file}[given]
        media = real.decode("video", data, expected.digest)
    assert np.array_equal(media.patches, expected.patches)
    assert (media.kind, media.grid, media.source) == ("video", expected.grid, expected.source)
    assert media.timestamps == expected.timestamps


@pytest.mark.parametrize("num_bytes", [0, 1, INLINE_BYTES, INLINE_BYTES + 1, 40 << 20])
def test_media_of_every_length_arrive_whole(num_bytes: int, hostile: Decoder) -> None:
    assert works(hostile, num_bytes)


def test_a_row_error_keeps_its_code_and_words(real: Decoder) -> None:
    with pytest.raises(RowError) as here:
        ImageProcessor(IMAGE).from_bytes(b"no image")
    error = error_of(real, b"no image")
    assert (error.code, error.message) == (here.value.code, here.value.message)
    first = real.pid
    assert error_of(real, b"").code == "bad_image"
    assert real.pid == first


def test_several_threads_may_ask(hostile: Decoder) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(works(hostile, n))) for n in range(1, 30)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 29


# ---- one item's death is one item's error ----


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("segfault", "died of SIGSEGV"),
        ("abort", "died of SIGABRT"),
        ("exit", "exited with status 3"),
        ("bug", "KeyError: 'unforeseen'"),
    ],
)
def test_a_crash_costs_one_item(word: str, says: str, hostile: Decoder) -> None:
    error = error_of(hostile, word.encode())
    assert (error.code, says in error.message) == ("decoder_crashed", True), error
    assert works(hostile)


def test_a_hang_is_ended_at_the_deadline(hostile: Decoder) -> None:
    assert works(hostile)
    first, begin = hostile.pid, time.monotonic()
    error = error_of(hostile, b"hang")
    assert 0.9 < time.monotonic() - begin < 3
    assert (error.code, "1 s" in error.message) == ("media_timeout", True)
    assert not psutil.pid_exists(first)
    assert works(hostile)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_it_decodes(sent: signal.Signals, make: Callable[..., Decoder]) -> None:
    decoder = make(HOSTILE)
    assert works(decoder)
    threading.Timer(0.2, os.kill, (decoder.pid, sent)).start()
    error = error_of(decoder, b"hang")
    assert (error.code, sent.name in error.message) == ("decoder_crashed", True)
    assert works(decoder)
    decoder.close()


def test_stopped_at_a_clip(make: Callable[..., Decoder]) -> None:
    """The real decoder, which cannot move."""
    decoder = make(timeout_s=1.0)
    decoder.decode("video", clip(), DIGEST)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGSTOP)
    with pytest.raises(RowError, match="media_timeout"):
        decoder.decode("video", clip(), DIGEST)
    assert decoder.decode("video", clip(), DIGEST).grid[0] == 4
    decoder.close()


def test_death_between_two_items_costs_none(hostile: Decoder) -> None:
    assert works(hostile)
    child = psutil.Process(hostile.pid)
    child.kill()
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.005)
    assert works(hostile)


def test_memory_is_bounded(hostile: Decoder) -> None:
    assert works(hostile)
    error = error_of(hostile, b"memory")  # 1 GiB of 256 MiB
    assert (error.code, "decode_bytes" in error.message) == ("media_too_large", True)
    assert works(hostile)


def test_what_earlier_items_left_behind_does_not_decide_about_later_ones(
    make: Callable[..., Decoder],
) -> None:
    """An item that does not fit beside what others leaked is given to a new process."""
    hostile = make(HOSTILE)
    assert works(hostile)
    first = hostile.pid
    assert error_of(hostile, b"leak").code == "leaked"  # 160 MiB of 256
    assert hostile.pid == first
    assert error_of(hostile, b"leak").code == "leaked"
    assert hostile.pid != first
    hostile.close()


def test_a_large_picture_stays_within_its_limit(make: Callable[..., Decoder]) -> None:
    """64 megapixels pass the header's check; decoded they take 200 MB, of which 64 MiB are allowed."""
    buffer = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(buffer, "PNG")
    decoder = make(num_bytes=64 << 20)
    decoder.decode("image", encoded(picture(40, 40), "PNG"), DIGEST)
    before = _peak(decoder.pid)
    assert error_of(decoder, buffer.getvalue()).code == "media_too_large"
    assert _peak(decoder.pid) - before < 80 << 20
    decoder.close()


@pytest.mark.parametrize("num_bytes", [48 << 20, 96 << 20])
def test_a_clip_stays_within_its_limit(num_bytes: int, make: Callable[..., Decoder]) -> None:
    """Twelve frames of 3840x2160 take 190 MB in the decoder, which calls an allocation that fails
    invalid data.
    """
    data = clip(12, 4, (2160, 3840), "one keyframe")
    decoder = make(num_bytes=num_bytes)
    with pytest.raises(RowError, match="media_too_large"):
        decoder.decode("video", data, DIGEST)
    with pytest.raises(RowError, match="bad_video"):
        decoder.decode("video", b"damaged", DIGEST)
    decoder.close()


def _peak(pid: int | None) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


# ---- the process itself ----


def test_a_process_that_cannot_start_is_no_rows_fault(make: Callable[..., Decoder]) -> None:
    with pytest.raises(EngineError, match="status 1"):
        make("tests.glm_actors.there_is_no_such_module").decode("image", b"x", DIGEST)


def test_it_gets_no_secrets(make: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    decoder = make(HOSTILE)
    environment = json.loads(error_of(decoder, b"environment").message)
    assert "secret" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "1"
    decoder.close()


def test_closing_ends_it_and_a_later_item_starts_another(make: Callable[..., Decoder]) -> None:
    decoder = make(HOSTILE)
    decoder.start()
    first = decoder.pid
    assert works(decoder)
    assert decoder.pid == first
    decoder.close()
    assert decoder.pid is None
    assert not psutil.pid_exists(first)
    decoder.close()
    assert works(decoder)
    decoder.close()


@pytest.mark.parametrize("word", ["idle", "hang"])
def test_it_does_not_outlive_its_parent(word: str) -> None:
    code = f"""
import threading
from glm_batch.glm_actors.media.media_loader import Decoder, Setup
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
setup = Setup(image=ImageProcessorConfig(), video=VideoProcessorConfig(), num_bytes=1 << 28, timeout_s=1.0)
decoder = Decoder(setup, module={HOSTILE!r})
decoder.decode("image", b"x", "")
print(decoder.pid, flush=True)
decoder.decode("image", b"hang", "") if {word == "hang"} else threading.Event().wait()
"""
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.2)
        parent.kill()
    begin = time.monotonic()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - begin < 5
        time.sleep(0.02)


def test_it_needs_neither_ray_nor_arrow() -> None:
    code = (
        "import sys\nfrom glm_batch.glm_actors.media.media_loader import make_decode\n"
        "from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig\n"
        "make_decode(ImageProcessorConfig(), VideoProcessorConfig())\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "av", "PIL"} <= loaded
    assert not loaded & {"ray", "pyarrow", "httpcore", "transformers"}
