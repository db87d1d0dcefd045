"""A cell of a media column to bytes, an open file, or a URL to fetch.

Owns what a cell may hold and which files may be read: regular ones below the declared root. Opens
files, no connections.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from glm_batch.models.errors import ConfigError, RowError

DEFAULT_PORTS = {"http": 80, "https": 443}

Endpoint = tuple[str, int]  # a host's name as DNS has it, in lower case, and a port
# Files up to this size are read at once; larger ones are handed on open.
READ_AT_ONCE = 1 << 20
SHOWN = 80  # characters of a cell in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRules:
    """Paths lie below `root`. URLs are read from `hosts`, at globally routable addresses alone, and
    from `private_hosts` at any address.

    A host is a name exactly as URLs have it, without wildcards; it allows the ports 80 and 443, and
    "name:port" that port alone. `max_bytes` is the size of one encoded image or clip,
    `decode_bytes` the memory that decoding one may take. Raises ConfigError.
    """

    root: str | None = None
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    max_bytes: int = 1 << 30
    fetch_timeout_s: float = 30.0
    decode_timeout_s: float = 600.0
    decode_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        endpoints([*self.hosts, *self.private_hosts])
        for name in ("max_bytes", "fetch_timeout_s", "decode_timeout_s", "decode_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"media.{name}: {getattr(self, name)!r}; it must be above 0")

    @property
    def allows_urls(self) -> bool:
        return bool(self.hosts or self.private_hosts)


def endpoints(hosts: Iterable[str]) -> frozenset[Endpoint]:
    """What the names of allowed hosts allow. Raises ConfigError for what is no name."""
    found: set[Endpoint] = set()
    for host in hosts:
        try:
            parts = urlsplit(f"//{host}")
            if not parts.hostname or parts.netloc != host or "@" in host or "*" in host:
                raise ValueError("write a name as example.org or example.org:8080")
            ports = DEFAULT_PORTS.values() if parts.port is None else [parts.port]
            found |= {(ascii_host(parts.hostname), port) for port in ports}
        except ValueError as error:
            raise ConfigError(f"media.hosts: {host!r} is no host: {error}") from error
    return frozenset(found)


def ascii_host(name: str) -> str:
    """A host's name as DNS and certificates have it. Raises ValueError for what is none."""
    return name.encode("idna").decode("ascii").lower().removesuffix(".")


@dataclass(frozen=True, slots=True)
class Url:
    """An http or https URL, not yet looked at further."""

    text: str


Source = bytes | memoryview | BinaryIO | Url


def read_source(value: object, rules: MediaRules) -> Source:
    """What a cell stands for; an open file must be closed by the caller. Raises RowError."""
    value = _unwrapped(value)
    if value is None:
        raise RowError("null_media", "the cell is null; it must hold bytes, a path or a URL")
    if isinstance(value, bytes | bytearray | memoryview):
        return _within(
            value if isinstance(value, bytes) else memoryview(value).cast("B"), rules.max_bytes
        )
    if isinstance(value, str):
        return _of_text(value, rules)
    found = (
        f"a struct of {sorted(map(str, value))}"
        if isinstance(value, Mapping)
        else type(value).__name__
    )
    raise RowError(
        "wrong_type",
        f"the cell holds {found}; it must be bytes, a path, a URL or a struct of bytes and path",
    )


def url_of(value: object) -> str | None:
    """The http or https URL that a cell stands for, if it is one."""
    value = _unwrapped(value)
    return value if isinstance(value, str) and _scheme(value) in DEFAULT_PORTS else None


def _unwrapped(value: object) -> object:
    """Of the layout of data sets, {"bytes": ..., "path": ...}, the bytes or the path."""
    if not isinstance(value, Mapping) or not {"bytes", "path"} & value.keys():
        return value
    return value.get("path") if value.get("bytes") is None else value["bytes"]


def _scheme(text: str) -> str:
    return text.partition(":")[0].lower() if ":" in text[:SHOWN] else ""


def _within(data: bytes | memoryview, max_bytes: int) -> bytes | memoryview:
    _check_size(len(data), max_bytes)
    return data


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise RowError(
            "media_too_large",
            f"{num_bytes:,} bytes, more than {max_bytes:,}; shrink it or raise media.max_bytes",
        )


def _of_text(text: str, rules: MediaRules) -> Source:
    if not text:
        raise RowError(
            "null_media", "the cell is an empty text; it must hold bytes, a path or a URL"
        )
    if "\0" in text:
        raise RowError(
            "media_not_found", f"{_shown(text)} holds a NUL character; no path or URL does"
        )
    scheme = _scheme(text)
    if scheme == "data":
        return _of_data_url(text, rules.max_bytes)
    if scheme in DEFAULT_PORTS:
        if not rules.allows_urls:
            shown = _shown(text.partition("?")[0])  # a query may hold a secret
            raise RowError(
                "media_forbidden",
                f"{shown} is a URL, and no host is allowed; name it in media.hosts",
            )
        return Url(text)
    if scheme == "file":
        return _open_below(_path_of(text), rules)
    if "://" in text[:SHOWN]:
        raise RowError(
            "media_forbidden",
            f"{_shown(text)}: {scheme}:// is not read; use a path, https:// or bytes",
        )
    return _open_below(text, rules)


def _of_data_url(text: str, max_bytes: int) -> bytes:
    """RFC 2397; base64 or percent-encoding. The size is known before decoding."""
    head, comma, body = text.partition(",")
    if not comma:
        raise RowError("wrong_type", f"{_shown(text)}: a data: URL needs a comma before its data")
    if not head.lower().endswith(";base64"):
        _check_size(len(body) // 3, max_bytes)
        return bytes(_within(unquote_to_bytes(body), max_bytes))
    _check_size(len(body) * 3 // 4 - 2, max_bytes)
    try:
        return base64.b64decode(unquote(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(
            "wrong_type", f"{_shown(text)}: the data: URL is no valid base64: {error}"
        ) from error


def _path_of(text: str) -> str:
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise RowError("media_not_found", f"{_shown(text)} is no valid URL: {error}") from error
    if parts.netloc.lower() not in ("", "localhost"):
        raise RowError(
            "media_forbidden",
            f"{_shown(text)} names the host {parts.netloc!r}; only local files are read",
        )
    path = unquote(parts.path, errors="surrogateescape")
    if "\0" in path:
        raise RowError("media_not_found", f"{_shown(text)} holds a NUL character; no path does")
    return path


def _open_below(path: str, rules: MediaRules) -> bytes | BinaryIO:
    """The regular file at a path, read if it is small. Raises RowError."""
    if rules.root is None:
        raise RowError(
            "media_forbidden", f"{_shown(path)} is a path, and no root is declared; set media.root"
        )
    try:
        real = _below(rules.root, path)
        _check_file(os.lstat(real), path, rules)  # opening a device may already do something
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RowError("media_not_found", f"{_shown(path)} below {rules.root}: {reason}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        _check_file(status, path, rules)  # what was opened may no longer be what was looked at
        stack.pop_all()
    file = os.fdopen(fd, "rb")
    if status.st_size > READ_AT_ONCE:
        return file
    with file:
        return _read(file, path)


def _read(file: BinaryIO, path: str) -> bytes:
    try:
        return file.read(READ_AT_ONCE)
    except OSError as error:
        raise RowError(
            "media_not_found", f"{_shown(path)} cannot be read: {error.strerror}"
        ) from error


def _below(root: str, path: str) -> str:
    """The path without links, which must lie below the root without links. Raises RowError."""
    root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        raise RowError("media_forbidden", f"{_shown(path)} lies outside of media.root, {root}")
    return real


def _check_file(status: os.stat_result, path: str, rules: MediaRules) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise RowError("media_not_found", f"{_shown(path)} is a link that leads nowhere")
    if not stat.S_ISREG(status.st_mode):
        raise RowError("media_forbidden", f"{_shown(path)} is no regular file")
    _check_size(status.st_size, rules.max_bytes)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
