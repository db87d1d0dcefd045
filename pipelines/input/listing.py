"""Which files an input names: on local disks and s3://, each with what tells that it has not
changed since.

Owns patterns, directories and names. Opens no file.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fsspec.utils import glob_translate

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.s3 import S3, Object

Format = Literal["parquet", "jsonl"]

SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
log = logging.getLogger(__name__)
MAGIC = re.compile(r"[*?\[]")  # where a glob begins


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


def _expand(pattern: str, storage: StorageSection) -> list[InputFile]:
    files = _remote_files(pattern, S3(storage)) if is_remote(pattern) else _local_files(pattern)
    for file in files:
        if os.path.splitext(file.path)[1] not in SUFFIXES:
            raise ConfigError(
                f"input: {file.name} is neither Parquet nor JSONL by its name "
                f"({', '.join(SUFFIXES)}); convert or unpack it, or narrow the pattern"
            )
    return files


def _remote_files(pattern: str, store: S3) -> list[InputFile]:
    """Objects that a glob, a folder or a name means; pages tell their sizes and tags."""
    try:
        if glob.has_magic(pattern):
            matches = re.compile(glob_translate(pattern)).fullmatch
            return _listed(
                store, MAGIC.split(pattern, maxsplit=1)[0], lambda url: matches(url) is not None
            )
        folder = _listed(store, pattern.rstrip("/") + "/", _is_data)
        return folder or [_remote_file(store.look(pattern))]
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
        paths = [
            path
            for path in glob.iglob(os.path.join(pattern, "**"), recursive=True)
            if _is_data(path)
        ]
    else:
        paths = glob.glob(pattern, recursive=True)
        paths = [pattern] if not paths and os.path.isfile(pattern) else paths
        paths = [path for path in paths if not os.path.isdir(path)]
    return [_local_file(path) for path in paths]


def _local_file(path: str) -> InputFile:
    status = os.stat(path)
    return InputFile(
        name=path, path=os.path.abspath(path), size=status.st_size, stamp=str(status.st_mtime_ns)
    )


def _remote_file(found: Object) -> InputFile:
    return InputFile(name=found.url, path=found.url, size=found.size, stamp=found.etag)


def _is_data(path: str) -> bool:
    return os.path.splitext(path)[1] in SUFFIXES and not os.path.basename(path).startswith(
        (".", "_")
    )
