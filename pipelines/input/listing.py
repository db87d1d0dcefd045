"""Which files an input names: on local disks and s3://, each with what tells that it has not
changed since.

Owns patterns, directories and names. Opens no file.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fsspec.utils import glob_translate

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.s3 import S3, Object

Format = Literal["parquet", "jsonl"]

SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
log = logging.getLogger(__name__)
# In a folder, tables of these are no input that could be overlooked.
UNREAD = (
    ".arrow", ".avro", ".bz2", ".csv", ".feather", ".gz", ".gzip", ".json", ".jsonlines", ".orc",
    ".parq", ".pq", ".tsv", ".xz", ".zst",
)  # fmt: skip
TABLES = {
    "Delta Lake": r"(^|/)_delta_log/",
    "Hudi": r"(^|/)\.hoodie/",
    "Iceberg": r"(^|/)metadata/[^/]+\.metadata\.json$",
}
MAGIC = re.compile(r"[*?\[]")  # where a glob begins
BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file before it was opened. `name` is as the job spells it; `stamp` tells a change."""

    name: str
    path: str
    size: int
    stamp: str

    @property
    def mark(self) -> tuple[str, int, str]:
        """Equal while the file is the same, also where a relative name leads to another path."""
        return self.name, self.size, self.stamp

    @property
    def format(self) -> Format:
        return SUFFIXES[os.path.splitext(self.path)[1]]


def list_files(
    patterns: Sequence[str], storage: StorageSection, *, may_be_gone: bool = False
) -> list[InputFile]:
    """The files that `input` names, each once, in name order. Raises ConfigError.

    With `may_be_gone`, a pattern that matches nothing is a warning as long as another one matches
    something.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        files = _expand(pattern, storage)
        if not files and not may_be_gone:
            raise ConfigError(
                f"input: {pattern!r} matches no Parquet or JSONL file; check the path"
            )
        if not files:
            log.warning("input: %r matches no Parquet or JSONL file now", pattern)
        for file in sorted(files, key=lambda file: file.name):
            found.setdefault(file.path, file)
    if not found and patterns:
        raise ConfigError(
            f"input: no file is left of {', '.join(map(repr, patterns))}; check that what holds "
            "them can be reached"
        )
    return list(found.values())


def is_remote(path: str) -> bool:
    return path.startswith("s3://")


def check_apart(patterns: Sequence[str], files: Sequence[InputFile], output: str) -> None:
    """Raises ConfigError where the input takes in what is written to `output`, or lies in it."""
    here = _whole(output)
    for pattern in map(_whole, patterns):
        if is_remote(pattern) != is_remote(here):
            continue
        is_folder = not glob.has_magic(pattern) and (is_remote(pattern) or os.path.isdir(pattern))
        matches = re.compile(glob_translate(pattern)).fullmatch
        taken = [f"{here}/{part}" for part in ("parts/0.parquet", "versions/0/parts/0.parquet")]
        if (is_folder and f"{here}/".startswith(f"{pattern}/")) or any(map(matches, taken)):
            raise ConfigError(
                f"input: {pattern!r} takes in what is written to the output {output!r}, so that "
                "each run would have more rows; let the output lie elsewhere, or narrow the pattern"
            )
    inside = [file.name for file in files if _whole(file.path).startswith(f"{here}/")]
    if inside:
        raise ConfigError(
            f"input: {inside[0]} lies in the output {output!r}; let the output be a folder of its "
            "own"
        )


def _whole(path: str) -> str:
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path)


def _expand(pattern: str, storage: StorageSection) -> list[InputFile]:
    """What a pattern names: a path that is there is that path, whatever characters it has."""
    store = S3(storage) if is_remote(pattern) else None
    files = _exact(pattern, store)
    for each in [] if files else _alternatives(pattern):
        files += _remote_files(each, store) if store else _local_files(each)
    for file in files:
        if os.path.splitext(file.path)[1] not in SUFFIXES:
            raise ConfigError(
                f"input: {file.name} is neither Parquet nor JSONL by its name "
                f"({', '.join(SUFFIXES)}); convert or unpack it, or narrow the pattern"
            )
    return files


def _exact(pattern: str, store: S3 | None) -> list[InputFile]:
    """The file of just this name, if its name reads like a pattern; others are found anyway."""
    if not BRACES.search(pattern) and not glob.has_magic(pattern):
        return []
    if store is None:
        return [_local_file(pattern)] if os.path.isfile(pattern) else []
    try:
        return [_remote_file(store.look(pattern))]
    except OSError:
        return []  # listing says what is wrong, if something is


def _alternatives(pattern: str) -> list[str]:
    """a/{b,c}/d -> a/b/d, a/c/d."""
    found = None if os.path.isdir(pattern) else BRACES.search(pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [each for one in found[1].split(",") for each in _alternatives(head + one + tail)]


def _remote_files(pattern: str, store: S3) -> list[InputFile]:
    """Objects that a glob, a folder or a name means; pages tell their sizes and tags."""
    try:
        if glob.has_magic(pattern):
            matches = re.compile(glob_translate(pattern)).fullmatch
            return _listed(
                store, MAGIC.split(pattern, maxsplit=1)[0], lambda url: matches(url) is not None
            )
        prefix = pattern.rstrip("/") + "/"
        listed = _listed(store, prefix, lambda url: True)
        folder = _of_folder(pattern, listed, [file.name[len(prefix) :] for file in listed])
        return folder if listed else [_remote_file(store.look(pattern))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"input: {pattern!r} cannot be listed ({error}); check storage and access"
        ) from error


def _listed(store: S3, prefix: str, is_wanted: Callable[[str], bool]) -> list[InputFile]:
    pages = store.pages(prefix, deep=True)
    return [_remote_file(each) for page, _ in pages for each in page if is_wanted(each.url)]


def _local_files(pattern: str) -> list[InputFile]:
    if os.path.isdir(pattern):
        try:
            paths = list(_walk(pattern))
        except OSError as error:
            raise ConfigError(
                f"input: {error.filename} cannot be listed: {error.strerror}"
            ) from error
        return _of_folder(
            pattern, map(_local_file, paths), [os.path.relpath(path, pattern) for path in paths]
        )
    paths = glob.glob(pattern, recursive=True)
    paths = [pattern] if not paths and os.path.isfile(pattern) else paths
    return [_local_file(path) for path in paths if not os.path.isdir(path)]


def _walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """All files below a folder. Links to folders are followed, but not back to where they lie."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, above | {real})
        else:
            yield path


def _of_folder(folder: str, files: Iterable[InputFile], names: Sequence[str]) -> list[InputFile]:
    """The data files among a folder's, by their names in it, as pyarrow.dataset picks them.

    What begins with "." or "_" is left out, folders too. Raises ConfigError for tables that this
    would read wrong or leave out in silence.
    """
    for kind, mark in TABLES.items():
        if any(re.search(mark, name) for name in names):
            raise ConfigError(
                f"input: {folder} is a table of {kind}, whose log says which files count; write "
                "its rows as Parquet first, or name the files"
            )
    found = []
    for file, name in zip(files, names, strict=True):
        if any(part.startswith((".", "_")) for part in name.split("/")):
            continue
        suffix = os.path.splitext(name)[1]
        if suffix in SUFFIXES:
            found.append(file)
        elif suffix.lower() in {*SUFFIXES, *UNREAD}:
            raise ConfigError(
                f"input: {file.name} in the folder {folder} would be left out: it is neither "
                f"Parquet nor JSONL by its name ({', '.join(SUFFIXES)}); convert or rename it, or "
                f"name the files, such as {folder.rstrip('/')}/*.parquet"
            )
    return found


def _local_file(path: str) -> InputFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(f"input: {path} cannot be read: {error.strerror}") from error
    return InputFile(
        name=path, path=os.path.abspath(path), size=status.st_size, stamp=str(status.st_mtime_ns)
    )


def _remote_file(found: Object) -> InputFile:
    return InputFile(name=found.url, path=found.url, size=found.size, stamp=found.etag)
