"""Cells to patches: every bad image and video ends as its own typed error, and equal content is
decoded once.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_batch.glm_actors.media.media_loader import MediaLoader, MediaRules
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig
from glm_batch.models.errors import RowError
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.video import VideoProcessor
from tests.bad_media import IMAGES, VIDEOS
from tests.glm_actors.media.test_fetcher import Server
from tests.models.processing.test_images import encoded, picture
from tests.models.processing.test_video import SMALL, clip

IMAGE = ImageProcessorConfig(max_pixels=1_000_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def loader(root: Path) -> Iterator[MediaLoader]:
    made = MediaLoader(MediaRules(root=str(root)), IMAGE, SMALL)
    made.start()
    yield made
    made.close()


@pytest.fixture
def asked(loader: MediaLoader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the items that the decoder was given."""
    digests: list[str] = []
    decode = loader._decoder.decode

    def counting(kind: Any, data: Any, digest: str) -> MediaPatches:
        digests.append(digest)
        return decode(kind, data, digest)

    monkeypatch.setattr(loader._decoder, "decode", counting)
    return digests


def code_of(result: MediaPatches | RowError) -> str:
    return result.code if isinstance(result, RowError) else "ok"


def patches_of(result: MediaPatches | RowError) -> MediaPatches:
    assert isinstance(result, MediaPatches), result
    return result


# ---- every bad file ----


@pytest.mark.parametrize("form", ["bytes", "path"])
def test_every_bad_file_in_one_call(form: str, loader: MediaLoader, root: Path) -> None:
    """In one call, through one decoding process, which lives to the end."""
    loader.load([("image", b"")])
    first = loader._decoder.pid
    parts: list[tuple[Any, object]] = []
    for kind, rows in (("image", IMAGES), ("video", VIDEOS)):
        for name, make, _ in rows:
            value = make()
            if form == "path" and isinstance(value, bytes):
                # whatever it is: nobody believes the extension
                (root / f"{kind} {name}.jpg").write_bytes(value)
                value = f"{kind} {name}.jpg"
            parts.append((kind, value))
    expected = [(name, code) for name, _, code in IMAGES + VIDEOS]
    results = loader.load(parts)
    found = [(name, code_of(result)) for (name, _), result in zip(expected, results, strict=True)]
    assert found == expected
    assert loader._decoder.pid == first
    for result in results:
        assert not isinstance(result, RowError) or len(result.message) < 300


def test_what_is_odd_but_readable_comes_out_right(loader: MediaLoader) -> None:
    by_name = {name: make for name, make, _ in IMAGES + VIDEOS}
    turned, first, grey = (
        patches_of(result)
        for result in loader.load(
            [("image", by_name[name]()) for name in ("exif-rotated", "animated", "16 bits")]
        )
    )
    assert turned.source == (1, 80, 40)
    # the red picture and not the blue one
    assert np.all(first.patches.reshape(-1, 3, 196)[:, 0] > 240)
    assert np.all(grey.patches == 40000 >> 8)
    upright, odd = (
        patches_of(result)
        for result in loader.load(
            [("video", by_name[name]()) for name in ("rotated", "odd counts")]
        )
    )
    assert upright.source[1:] == (96, 64)
    assert (odd.grid[0], len(odd.timestamps)) == (1, 1)


def test_a_huge_frame(root: Path) -> None:
    loader = MediaLoader(MediaRules(), IMAGE, replace(SMALL, max_source_pixels=64 * 96 - 1))
    assert [code_of(result) for result in loader.load([("video", clip())])] == ["media_too_large"]
    loader.close()


# ---- the same as decoding in process ----


def test_results_come_in_order_and_equal_those_of_the_processors(
    loader: MediaLoader, root: Path
) -> None:
    image, moving = encoded(picture(90, 70), "PNG"), clip(20)
    (root / "moving.mp4").write_bytes(moving)
    text = "data:image/png;base64," + base64.b64encode(image).decode()
    given: list[tuple[Any, object]] = [
        ("video", {"bytes": None, "path": "moving.mp4"}),
        ("image", memoryview(image)),
        ("image", "missing.png"),
        ("image", text),
        ("video", moving),
    ]
    results = loader.load(given)
    expected = {
        "image": ImageProcessor(IMAGE).from_bytes(image),
        "video": VideoProcessor(SMALL).from_bytes(moving),
    }
    assert code_of(results.pop(2)) == "media_not_found"
    for (kind, _), result in zip([*given[:2], *given[3:]], results, strict=True):
        media = patches_of(result)
        assert np.array_equal(media.patches, expected[kind].patches)
        assert (media.digest, media.grid) == (expected[kind].digest, expected[kind].grid)
        assert (media.source, media.timestamps) == (
            expected[kind].source,
            expected[kind].timestamps,
        )


def test_nothing_in_nothing_out(loader: MediaLoader) -> None:
    assert loader.load([]) == []


# ---- equal content ----


def test_equal_content_is_decoded_once(loader: MediaLoader, asked: list[str], root: Path) -> None:
    data, other = (encoded(picture(50, 50, seed), "PNG") for seed in (71, 72))
    (root / "equal.png").write_bytes(data)
    results = loader.load(
        [("image", data), ("image", other), ("image", bytearray(data)), ("image", "equal.png")]
    )
    results += loader.load([("image", data)])
    assert len(asked) == 2
    assert len({id(result) for result in results}) == 2
    assert results[0] is results[2] is results[3] is results[4]


def test_an_error_of_equal_content_is_found_once(loader: MediaLoader, asked: list[str]) -> None:
    results = loader.load([("image", b"no image, 71")] * 3 + [("video", b"no image, 71")])
    assert [code_of(result) for result in results] == ["bad_image"] * 3 + ["bad_video"]
    assert len(asked) == 2


def test_the_memory_of_results_is_bounded(
    asked: list[str], loader: MediaLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (encoded(picture(300, 300, seed), "PNG") for seed in (81, 82))
    for data in (first, second, first, second):
        media = patches_of(loader.load([("image", data)])[0])
    assert len(asked) == 2
    monkeypatch.setattr(loader._results, "max_bytes", media.patches.nbytes)
    for data in (encoded(picture(300, 300, 83), "PNG"), first, second, first):
        loader.load([("image", data)])
        assert loader._results.num_bytes <= media.patches.nbytes
    assert len(asked) == 6


def test_a_crash_is_not_remembered(loader: MediaLoader) -> None:
    """The machine may have run out of memory at that moment; the same image may do well later."""
    data = clip(30, 10)
    loader.load([("image", b"")])
    pid = loader._decoder.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    results = loader.load(
        [("video", data), ("image", encoded(picture(33, 44), "PNG")), ("video", data)]
    )
    assert [code_of(result) for result in results] == ["decoder_crashed", "ok", "ok"]


def test_a_hang_costs_its_row_and_no_other(root: Path) -> None:
    loader = MediaLoader(MediaRules(decode_timeout_s=0.5), IMAGE, SMALL)
    good = encoded(picture(33, 44), "PNG")
    loader.load([("image", b"")])
    assert loader._decoder.pid is not None
    os.kill(loader._decoder.pid, signal.SIGSTOP)
    results = loader.load([("image", good), ("image", good)])
    assert [code_of(result) for result in results] == ["media_timeout", "ok"]
    loader.close()


# ---- URLs ----


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_urls_are_fetched_and_decoded_in_order(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encoded(picture(30, 30 + number), "PNG") for number in range(20)]
    monkeypatch.setattr(
        "tests.glm_actors.media.test_fetcher.Handler.do_file",
        lambda self: self.answer(200, images[int(self.path.rpartition("/")[2])]),
    )
    loader = MediaLoader(server.rules, IMAGE, SMALL)
    order = [*range(20), 3, 3, 19]
    values: list[Any] = [server.url(f"file/{number}") for number in order]
    values[5] = {"bytes": None, "path": values[5]}
    values[7:7] = [images[0], "http://elsewhere.example/x", server.url("missing"), "a.png"]
    results = loader.load([("image", value) for value in values])
    assert [code_of(result) for result in results[7:11]] == [
        "ok",
        "media_forbidden",
        "media_not_found",
        "media_forbidden",
    ]
    widths = [patches_of(result).source[2] for result in [*results[:7], *results[11:]]]
    assert widths == [30 + number for number in order]
    assert len(server.seen) == 21  # each once
    loader.close()


def test_urls_are_fetched_side_by_side(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(30, 30), "PNG")

    def slowly(handler: Any) -> None:
        time.sleep(0.3)
        handler.answer(200, data)

    monkeypatch.setattr("tests.glm_actors.media.test_fetcher.Handler.do_file", slowly)
    loader = MediaLoader(server.rules, IMAGE, SMALL)
    loader.load([("image", data)])
    begin = time.monotonic()
    results = loader.load([("image", server.url(f"file/{number}")) for number in range(16)])
    assert time.monotonic() - begin < 2  # one after the other takes 4.8 s
    assert [code_of(result) for result in results] == ["ok"] * 16
    loader.close()


def test_without_hosts_no_client_is_made(loader: MediaLoader) -> None:
    results = loader.load([("image", "https://example.org/a.png?key=secret"), ("image", b"")])
    assert [code_of(result) for result in results] == ["media_forbidden", "bad_image"]
    assert "secret" not in str(results[0])
    assert loader._fetcher is None


# ---- imports ----


def test_importing_the_loader_imports_no_decoder_and_no_client() -> None:
    code = "import sys, glm_batch.glm_actors.media.media_loader\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "av", "PIL", "ray", "httpx", "httpcore", "pyarrow"}
