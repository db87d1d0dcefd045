"""A cron output: dated versions, each an ordinary output, and the manifest of the one in force.

    versions/2026-11-20T02-00-00Z/   plan, parts, commits, manifest: see pipelines.output.commit
    manifest.json                    the manifest in force, its parts named from here
    lease/                           which driver owns all of it

A version without a manifest is not finished; one without a plan is nothing yet, or about to go.
Names only grow, also when the clock goes backwards.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input.listing import is_remote
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.output import lease as leases
from glm_batch.pipelines.output.commit import LEASE, PLAN, PLAN_NAME, Output
from glm_batch.pipelines.output.manifest import MANIFEST
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.storage.storage import TEMPORARY, Store, check_store, open_store, reach

VERSIONS = "versions"
NAME_FORMAT = "%Y-%m-%dT%H-%M-%SZ"
NAME = re.compile(r"\d{4,}(-\d\d){2}T\d\d(-\d\d){2}Z")
OWN_NAMES = {VERSIONS, LEASE, TEMPORARY, MANIFEST}


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions below one output path."""

    path: str
    store: Store
    storage: StorageSection

    @classmethod
    def at(cls, path: str, storage: StorageSection) -> Versions:
        """Raises ConfigError for a kind of place that outputs cannot be committed to."""
        path = path.rstrip("/") or "/"
        return cls(path, open_store(path, storage), storage)

    def prepare(self) -> None:
        """Makes the place fit for versions. Raises ConfigError where other things lie."""
        entries = [entry.name for page in self.store.pages() for entry in page]
        if PLAN in entries:
            raise ConfigError(
                f"output: {self.store.place} is the output of a label job; cron keeps dated "
                "versions: name a new place"
            )
        if strange := sorted(set(entries) - OWN_NAMES):
            raise ConfigError(
                f"output: {self.store.place} holds something else ({', '.join(strange[:5])}); name "
                "an empty or new place"
            )
        if VERSIONS in entries:
            return
        try:
            self.store.prepare([VERSIONS, LEASE, TEMPORARY])
        except OSError as error:
            raise ConfigError(f"output: {self.store.place} cannot be written ({error})") from error
        check_store(self.store)

    @contextmanager
    def owned(self) -> Iterator[leases.Lease]:
        """The lease of all versions; at its end, what dead owners left is removed.

        Raises BusyError when a living driver has it.
        """
        # later ones may be ours
        temporaries = [entry.name for page in self.store.pages(TEMPORARY) for entry in page]
        with leases.own(self.store) as lease:
            yield lease
            lease.confirm()
            for temporary in temporaries:
                self.store.delete(temporary)
            leases.tidy(self.store)

    def output(self, name: str) -> Output:
        return Output.at(f"{self.path}/{VERSIONS}/{name}", self.storage)

    def names(self) -> list[str]:
        """All that begins like a version, oldest first."""
        entries = (entry for page in self.store.pages(VERSIONS) for entry in page)
        return sorted(
            entry.name.removeprefix(f"{VERSIONS}/") for entry in entries if entry.size is None
        )

    def new_name(self) -> str:
        """The present second as UTC, but later than the latest version in any case."""
        now = datetime.fromtimestamp(int(time.time()), UTC)
        if names := self.names():
            latest = datetime.strptime(names[-1], NAME_FORMAT).replace(tzinfo=UTC)
            now = max(now, latest + timedelta(seconds=1))
        return now.strftime(NAME_FORMAT)

    def in_force(self) -> str | None:
        """The version that readers see, None before the first one."""
        try:
            return str(json.loads(self.store.read(MANIFEST))["version"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"output: {self.store.place}/{MANIFEST} is none of a cron output ({error}); "
                "restore it, or name another place"
            ) from error

    def unfinished(self) -> list[str]:
        """Versions that have a plan and are later than the one in force, oldest first."""
        in_force = self.in_force() or ""
        return [name for name in self.names() if name > in_force and PLAN in self._files(name)]

    def publish(self, name: str) -> None:
        """Puts a finished version in force, at one stroke."""
        content = self._manifest_of(name)
        with self.output(name).writable():
            reach("before_publish")
            self.store.write(MANIFEST, json.dumps(content, indent=1).encode())
            reach("after_publish")

    def catch_up(self, name: str) -> bool:
        """Puts the version in force anew if the manifest says something else; whether it did.

        A retry makes both anew, and may die between them.
        """
        try:
            is_same = self._manifest_of(name) == json.loads(self.store.read(MANIFEST))
        except FileNotFoundError:
            return False
        if not is_same:
            self.publish(name)
        return not is_same

    def parts_in_force(self, name: str) -> set[str]:
        """The parts of this version that readers of the version in force may open."""
        content = (
            json.loads(self.store.read(MANIFEST)) if self.in_force() == name else {"parts": []}
        )
        return {str(part["part"]).removeprefix(f"{VERSIONS}/{name}/") for part in content["parts"]}

    def _manifest_of(self, name: str) -> dict[str, Any]:
        """The manifest that puts a version in force. Raises FileNotFoundError."""
        content: dict[str, Any] = json.loads(self.output(name).store.read(MANIFEST))
        folder = f"{VERSIONS}/{name}"
        content["version"] = name
        for part in content["parts"]:
            part["part"] = f"{folder}/{part['part']}"
        for deleted in content.get("deleted", []):
            deleted["parts"] = [f"{folder}/{part}" for part in deleted["parts"]]
        return content

    def prune(self, keep: int) -> list[str]:
        """Removes all but the latest `keep` versions, and unfinished ones; for the owner.

        What is in force stays. A version loses its plan first, so that one half removed is taken
        for nothing else.
        """
        in_force, finished, rest = self.in_force(), list[str](), list[str]()
        for name in self.names():
            (finished if {PLAN, MANIFEST} <= self._files(name) else rest).append(name)
        gone = [
            name for name in [*rest, *finished[: max(len(finished) - keep, 0)]] if name != in_force
        ]
        for name in gone:
            self.remove(name)
        return gone

    def remove(self, name: str) -> None:
        folder = f"{VERSIONS}/{name}"
        for file in sorted(self._files(name), reverse=True):
            if PLAN_NAME.fullmatch(file):
                self.store.delete(f"{folder}/{file}")
        reach("before_remove")
        self.store.remove(folder)

    def copy_part(self, source: str, part: str, target: str, name: str) -> None:
        """Gives the version `target` a part of the version `source`. Raises FileNotFoundError."""
        self.store.copy(f"{VERSIONS}/{source}/{part}", f"{VERSIONS}/{target}/{name}")

    def _files(self, name: str) -> set[str]:
        folder = f"{VERSIONS}/{name}"
        return {
            entry.name.removeprefix(f"{folder}/")
            for page in self.store.pages(folder)
            for entry in page
        }


def plans(versions: Versions, names: Sequence[str]) -> list[tuple[str, Plan]]:
    """Names and plans of versions. Raises ConfigError for one that has none."""
    return [(name, versions.output(name).standing_plan()) for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedOutput:
    """The output that a path means: an ordinary one, or the version `name` of a cron output."""

    path: str
    output: Output
    versions: Versions | None = None
    name: str = ""

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Keeps cron from the version meanwhile; then puts it in force anew if it is.

        The output's own lease is still to be taken. Raises BusyError when a run of cron is at work.
        """
        if self.versions is None:
            yield
            return
        with self.versions.owned() as lease:
            yield
            lease.confirm()
            if self.versions.in_force() == self.name:
                self.versions.catch_up(self.name)

    def parts_in_force(self) -> set[str]:
        return self.versions.parts_in_force(self.name) if self.versions is not None else set()


def find(path: str, storage: StorageSection) -> NamedOutput:
    """The output at a path, or the version in force below it, or else the latest begun.

    Raises ConfigError for a cron output without any version.
    """
    above, name = _split(path)
    if above and NAME.fullmatch(name):
        return NamedOutput(
            path=path,
            output=Output.at(path, storage),
            versions=Versions.at(above, storage),
            name=name,
        )
    versions = Versions.at(path, storage)
    if not _keeps_versions(versions.store):
        return NamedOutput(path=path, output=Output(versions.store))
    name = versions.in_force() or max(versions.unfinished(), default="")
    if not name:
        raise ConfigError(
            f"{versions.store.place} holds no version yet: glm-batch cron makes the first one"
        )
    place = f"{versions.path}/{VERSIONS}/{name}"
    return NamedOutput(path=place, output=versions.output(name), versions=versions, name=name)


def _split(path: str) -> tuple[str, str]:
    """The cron output and the version that a path names; empty where it names none."""
    whole = path if is_remote(path) else os.path.abspath(path)
    above, _, name = whole.rstrip("/").rpartition(f"/{VERSIONS}/")
    return above, name


def _keeps_versions(store: Store) -> bool:
    try:
        names = {entry.name for page in store.pages() for entry in page}
    except NotADirectoryError:  # which whoever opens the output says in words
        return False
    return VERSIONS in names and not any(map(PLAN_NAME.fullmatch, names))
