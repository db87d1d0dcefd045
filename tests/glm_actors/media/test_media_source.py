"""What a cell of a media column may hold, and which files may be read."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_batch.glm_actors.media.media_source import (
    READ_AT_ONCE,
    MediaRules,
    Url,
    read_source,
    url_of,
)
from glm_batch.models.errors import ConfigError, RowError

DATA = bytes(range(256))
NO_RULES = MediaRules()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a file, a folder, and links into and out of it; beside it, files that are none of
    its business.
    """
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b c%.jpg", "ü.png", "../secret", "../root2"):
        (folder / name).write_bytes(DATA)
    (folder / "inner").symlink_to("sub/b c%.jpg")
    (folder / "outer").symlink_to("../secret")
    (folder / "outer_folder").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    return folder


def read(value: object, rules: MediaRules = NO_RULES) -> bytes:
    source = read_source(value, rules)
    assert isinstance(source, bytes | memoryview)
    return bytes(source)


def error_of(value: object, rules: MediaRules = NO_RULES) -> RowError:
    with pytest.raises(RowError) as caught:
        read_source(value, rules)
    return caught.value


# ---- bytes ----


@pytest.mark.parametrize(
    "value",
    [
        DATA,
        bytearray(DATA),
        memoryview(DATA),
        {"bytes": DATA, "path": None},
        {"bytes": DATA, "path": "anything"},
        {"bytes": DATA},
        "data:image/png;base64," + base64.b64encode(DATA).decode(),
        "data:;base64," + base64.b64encode(DATA).decode().replace("+", "%2B").replace("=", "%3d"),
        "DATA:image/png;charset=x;BASE64," + base64.b64encode(DATA).decode(),
        "data:," + "".join(f"%{byte:02x}" for byte in DATA),
    ],
)
def test_bytes_in_every_form(value: object) -> None:
    assert read(value) == DATA


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "null_media"),
        ("", "null_media"),
        ({"bytes": None, "path": None}, "null_media"),
        ({"path": ""}, "null_media"),
        (5, "wrong_type"),
        (["a.jpg"], "wrong_type"),
        ({"url": "x"}, "wrong_type"),
        ({"bytes": 5}, "wrong_type"),
        ("data:image/png;base64", "wrong_type"),
        ("data:image/png;base64,????", "wrong_type"),
        ("data:image/png;base64,QUJ", "wrong_type"),
        ("data:image/png;base64,ü", "wrong_type"),
    ],
)
def test_cells_that_hold_no_media(value: object, code: str) -> None:
    assert error_of(value).code == code


@pytest.mark.parametrize("text", ["s3://bucket/a.jpg", "ftp://example.org/a", "gopher://x"])
def test_other_schemes(text: str, root: Path) -> None:
    error = error_of(text, MediaRules(root=str(root), hosts=("example.org",)))
    assert (error.code, "is not read" in error.message) == ("media_forbidden", True)


def test_empty_bytes_are_left_to_the_decoder() -> None:
    assert read(b"") == b""


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data,
        lambda data: {"bytes": data},
        lambda data: "data:;base64," + base64.b64encode(data).decode(),
        lambda data: "data:," + data.decode(),
    ],
)
def test_the_limit_in_bytes(make: Callable[[bytes], Any]) -> None:
    rules = MediaRules(max_bytes=100)
    assert read(make(b"x" * 100), rules) == b"x" * 100
    error = error_of(make(b"x" * 104), rules)
    assert (error.code, "max_bytes" in error.message) == ("media_too_large", True)


def test_a_data_url_is_not_decoded_to_learn_that_it_is_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *args, **options: pytest.fail("decoded"))
    assert (
        error_of("data:;base64," + "A" * 1000, MediaRules(max_bytes=100)).code == "media_too_large"
    )


# ---- files ----


@pytest.mark.parametrize(
    "path",
    [
        "a.jpg", "./a.jpg", "sub/../a.jpg", "sub/b c%.jpg", "ü.png", "inner", "{root}/a.jpg", "{root}/sub/../a.jpg",
        "file://{root}/a.jpg", "FILE://{root}/sub/b%20c%25.jpg", "file://localhost{root}/%C3%BC.png",
        "file:{root}/a.jpg",
        "../root/a.jpg", "outer_folder/root/a.jpg",
    ],
)  # fmt: skip
def test_files_below_the_root(path: str, root: Path) -> None:
    rules = MediaRules(root=str(root))
    assert read(path.format(root=root), rules) == DATA
    assert read({"bytes": None, "path": path.format(root=root)}, rules) == DATA


@pytest.mark.parametrize(
    "path",
    [
        "../secret", "{root}/../secret", "/etc/passwd", "outer", "outer_folder/secret", "file:///etc/passwd",
        "file://{root}/%2e%2e/secret", "file://{root}/..%2Fsecret", "../root2", "file://other.example{root}/a.jpg",
        "/proc/self/environ", "/dev/zero",
    ],
)  # fmt: skip
def test_files_elsewhere(path: str, root: Path) -> None:
    assert error_of(path.format(root=root), MediaRules(root=str(root))).code == "media_forbidden"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing.jpg", "media_not_found"),
        ("a.jpg/b", "media_not_found"),
        ("a\0.jpg", "media_not_found"),
        ("file:///a%00.jpg", "media_not_found"),
        ("x" * 300, "media_not_found"),
        ("x/" * 5000, "media_not_found"),
        ("circle", "media_not_found"),
        ("\ud800.jpg", "media_not_found"),
        ("sub", "media_forbidden"),
        (".", "media_forbidden"),
    ],
)
def test_paths_to_no_file(path: str, code: str, root: Path) -> None:
    error = error_of(path, MediaRules(root=str(root)))
    assert error.code == code
    assert len(error.message) < 400


def test_only_regular_files_are_opened(root: Path) -> None:
    """A pipe would make its reader wait, and a socket or device is no image."""
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket"))
        for name in ("pipe", "socket"):
            assert error_of(name, MediaRules(root=str(root))).code == "media_forbidden"
    assert error_of("zero", MediaRules(root="/dev")).code == "media_forbidden"


def test_without_a_root_no_path_is_read(root: Path) -> None:
    error = error_of(str(root / "a.jpg"))
    assert (error.code, "media.root" in error.message) == ("media_forbidden", True)


def test_a_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("root")
    assert read("a.jpg", MediaRules(root=str(tmp_path / "link"))) == DATA
    assert read(str(root / "a.jpg"), MediaRules(root=str(tmp_path / "link"))) == DATA
    assert read("tmp/../../../../.." + str(root / "a.jpg"), MediaRules(root="/")) == DATA


def test_the_size_of_a_file_is_known_before_it_is_read(root: Path) -> None:
    with (root / "huge").open("wb") as file:
        file.truncate(1 << 40)
    error = error_of("huge", MediaRules(root=str(root)))
    assert (error.code, "1,099,511,627,776" in error.message) == ("media_too_large", True)


@pytest.mark.parametrize("more", [0, 1])
def test_large_files_are_handed_on_open(more: int, root: Path) -> None:
    (root / "large").write_bytes(bytes(READ_AT_ONCE + more))
    source = read_source("large", MediaRules(root=str(root)))
    if more:
        assert not isinstance(source, bytes | memoryview | Url)
        with source:
            assert source.read() == bytes(READ_AT_ONCE + 1)
    else:
        assert source == bytes(READ_AT_ONCE)


def test_a_refused_file_is_closed_again(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        error_of("sub", MediaRules(root=str(root)))
        error_of("a.jpg", MediaRules(root=str(root), max_bytes=9))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails_is_a_row_error(root: Path) -> None:
    """The kernel refuses to read this regular file at its begin."""
    error = error_of("self/mem", MediaRules(root="/proc"))
    assert (error.code, "cannot be read" in error.message) == ("media_not_found", True)


# ---- URLs ----


@pytest.mark.parametrize("url", ["http://example.org/a.jpg", "HTTPS://example.org/a.jpg"])
def test_urls_are_off_unless_a_host_is_named(url: str) -> None:
    error = error_of(url)
    assert (error.code, "media.hosts" in error.message) == ("media_forbidden", True)
    assert read_source(url, MediaRules(hosts=("example.org",))) == Url(url)
    assert read_source({"bytes": None, "path": url}, MediaRules(private_hosts=("inner",))) == Url(
        url
    )


def test_which_cells_are_urls() -> None:
    assert url_of("http://example.org/a.jpg") == "http://example.org/a.jpg"
    assert url_of({"bytes": None, "path": "https://example.org/a"}) == "https://example.org/a"
    for value in (
        "a.jpg",
        "file:///a",
        "data:,x",
        b"http://x",
        None,
        5,
        {"bytes": b"x", "path": "http://x"},
        "",
    ):
        assert url_of(value) is None


@pytest.mark.parametrize(
    "name", ["max_bytes", "fetch_timeout_s", "decode_timeout_s", "decode_bytes"]
)
def test_limits_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        MediaRules(**{name: 0})
