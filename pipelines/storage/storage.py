"""Where an output lives: a directory or an s3:// prefix, as the few calls that the commit protocol
needs; and where tests aim their kills.

    read, write (whole and durable, replacing; at once or piece by piece), create (whole and
    durable, the first writer wins), copy, list, delete, size

Names are relative to the store, with "/" between folders. Failures are OSErrors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Protocol

from glm_batch.models.errors import ConfigError, GlmBatchError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.s3 import S3

VARIABLE = "GLM_BATCH_CRASH_AT"
_reached: Counter[str] = Counter()


def reach(point: str) -> None:
    """Says that this process is at `point`; it may be the last thing that it does."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    aim, _, marker = asked.partition("@")
    wanted, _, count = aim.partition(":")
    if point != wanted:
        return
    _reached[point] += 1
    if _reached[point] == int(count or 1) and (not marker or _is_first(marker)):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


TEMPORARY = "tmp"
PAGE = 1000
REMOVERS = 32  # requests in flight to a store with long round trips


class StorageError(GlmBatchError):
    """A store went on failing: a full disk, lost access. What is committed stays; run it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of a store; a folder has no size."""

    name: str
    size: int | None


class Writer(Protocol):
    """Takes the content of a file piece by piece."""

    def write(self, data: bytes, /) -> object: ...


class Store(Protocol):
    """What the commit protocol asks of a place, from several threads and processes at once."""

    @property
    def place(self) -> str:
        """What people call it: a path, or s3://..."""

    def prepare(self, folders: Sequence[str]) -> None:
        """Makes folders, where a store has such things."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces `name`, durable; readers see the old content or the new one."""

    def replacing(self, name: str) -> AbstractContextManager[Writer]:
        """As `write`, of what is too much for the memory; counts when the context ends well."""

    def create(self, name: str, data: bytes) -> bool:
        """Makes `name`, durable, unless it exists; whether it did. `data` must be unique."""

    def copy(self, source: str, name: str) -> None:
        """Makes `name` of another file without moving its bytes. Raises FileNotFoundError."""

    def pages(self, folder: str = "") -> Iterator[list[Entry]]:
        """The files and folders right below `folder`, in pages and any order; maybe none."""

    def delete(self, name: str) -> None:
        """Removes a file; one that is gone already is no error."""

    def remove(self, folder: str) -> None:
        """Removes a folder and all in it, in any order; one that is gone is no error."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when there is none."""


def open_store(path: str, storage: StorageSection) -> Store:
    """Raises ConfigError for a kind of place that outputs cannot be committed to."""
    if path.startswith("s3://"):
        return S3Store(path.rstrip("/"), storage)
    if "://" in path:
        raise ConfigError(
            f"output: {path}: outputs are directories or s3:// prefixes; name one of these"
        )
    return LocalStore(Path(os.path.abspath(path)))


def check_store(store: Store) -> None:
    """Raises ConfigError unless the store tells a second writer from the first one."""
    name = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
    try:
        store.prepare([TEMPORARY])
        told = (
            store.create(name, b"first")
            and not store.create(name, b"second")
            and store.read(name) == b"first"
        )
        store.delete(name)
    except OSError as error:
        raise ConfigError(
            f"output: {store.place} cannot be written ({error}); choose another place"
        ) from error
    if not told:
        raise ConfigError(
            f"output: {store.place} lets a second writer replace a file that must be created once "
            "(a store without conditional writes, If-None-Match); rows could be lost there: "
            "choose another place"
        )


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A directory. Files have temporary names first, so that no reader sees half of one."""

    root: Path

    @property
    def place(self) -> str:
        return str(self.root)

    def prepare(self, folders: Sequence[str]) -> None:
        for folder in folders:
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        temporary = self._write_temporary(data)
        reach("before_rename")
        os.replace(temporary, self.root / name)
        _sync_directory((self.root / name).parent)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Writer]:
        with self._temporary() as (path, stream):
            yield stream
        reach("before_rename")
        os.replace(path, self.root / name)
        _sync_directory((self.root / name).parent)

    def create(self, name: str, data: bytes) -> bool:
        temporary = self._write_temporary(data)
        reach("before_link")
        try:
            os.link(temporary, self.root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory((self.root / name).parent)
        return True

    def copy(self, source: str, name: str) -> None:
        os.link(self.root / source, self.root / name)
        _sync_directory((self.root / name).parent)

    def pages(self, folder: str = "") -> Iterator[list[Entry]]:
        prefix = f"{folder}/" if folder else ""
        page: list[Entry] = []
        try:
            entries = os.scandir(self.root / folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # it went while we looked
                    page.append(_described(prefix, entry))
                if len(page) == PAGE:
                    yield page
                    page = []
        if page:
            yield page

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / folder)

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def _write_temporary(self, data: bytes) -> Path:
        with self._temporary() as (path, stream):
            stream.write(data)
        return path

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, BufferedWriter]]:
        """A new file that is durable at the end; gone after an error."""
        path = self.root / TEMPORARY / uuid.uuid4().hex
        try:
            with path.open("xb") as stream:
                yield path, stream
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


@dataclass(frozen=True, slots=True)
class S3Store:
    """The objects below an s3:// prefix."""

    url: str
    storage: StorageSection

    @property
    def place(self) -> str:
        return self.url

    def prepare(self, folders: Sequence[str]) -> None:
        pass

    def read(self, name: str) -> bytes:
        return self._s3.read(f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self._s3.write(f"{self.url}/{name}", data)

    def replacing(self, name: str) -> AbstractContextManager[Writer]:
        return self._s3.replacing(f"{self.url}/{name}")

    def create(self, name: str, data: bytes) -> bool:
        return self._s3.create(f"{self.url}/{name}", data)

    def copy(self, source: str, name: str) -> None:
        self._s3.copy(f"{self.url}/{source}", f"{self.url}/{name}")

    def pages(self, folder: str = "") -> Iterator[list[Entry]]:
        prefix = f"{self.url}/{folder}/" if folder else f"{self.url}/"
        start = len(self.url) + 1
        for objects, folders in self._s3.pages(prefix, deep=False):
            page = [Entry(name=each.url[start:], size=each.size) for each in objects]
            page += [Entry(name=each[start:].rstrip("/"), size=None) for each in folders]
            if page:
                yield page

    def delete(self, name: str) -> None:
        self._s3.delete(f"{self.url}/{name}")

    def remove(self, folder: str) -> None:
        with ThreadPoolExecutor(REMOVERS) as pool:
            for objects, _ in self._s3.pages(f"{self.url}/{folder}/", deep=True):
                list(pool.map(self._s3.delete, [each.url for each in objects]))

    def size(self, name: str) -> int | None:
        try:
            return self._s3.look(f"{self.url}/{name}").size
        except FileNotFoundError:
            return None

    @property
    def _s3(self) -> S3:
        return S3(self.storage)


def _described(prefix: str, entry: os.DirEntry[str]) -> Entry:
    return Entry(name=prefix + entry.name, size=None if entry.is_dir() else entry.stat().st_size)


def _sync_directory(path: Path) -> None:
    """Makes new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
