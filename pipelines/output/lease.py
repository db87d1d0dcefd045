"""Who owns an output: at most one driver works on it, and a dead one's place is taken over.

    OUTPUT/lease/epoch-N.json   created once by the driver that owns the output in its N-th epoch
    OUTPUT/lease/beat-N.json    written anew by it every BEAT_S seconds, and when it is done

A driver counts as dead when its process is provably gone (the same boot and process namespace of
the same machine), or when its beat has not changed for DEAD_AFTER_S on the clock of the one who
looks: clocks are never compared. Whoever finds the next epoch taken has lost the output. Commit
records stay safe without all this, as the first one wins; the lease keeps drivers from doing each
other's work, and from replacing each other's manifests.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm_batch.models.errors import ConfigError, GlmBatchError
from glm_batch.pipelines.storage.storage import Store, reach

FOLDER = "lease"
BEAT_S = 5.0
DEAD_AFTER_S = 30.0
POLL_S = 1.0
EPOCH_NAME = re.compile(rf"{FOLDER}/epoch-(\d+)\.json")

log = logging.getLogger(__name__)


class BusyError(ConfigError):
    """A living driver owns the output."""


class LeaseLostError(GlmBatchError):
    """Another driver owns the output now; this one must not finish it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A driver that owns or owned an output; `boot`, `namespace`, `started` tell its process."""

    epoch: int
    id: str
    host: str
    user: str
    pid: int
    boot: str
    namespace: str
    started: str
    since: str

    @classmethod
    def this_process(cls, epoch: int) -> Holder:
        return cls(
            epoch=epoch,
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            user=_user(),
            pid=os.getpid(),
            boot=_boot(),
            namespace=_namespace(),
            started=_started(os.getpid()) or "",
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def is_alive(self) -> bool | None:
        """Whether its process runs, None where that cannot be known from here."""
        if not self.boot or (self.boot, self.namespace) != (_boot(), _namespace()):
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


class Lease:
    """This driver's ownership of an output, from `take` to `release`."""

    def __init__(self, store: Store, holder: Holder) -> None:
        self._store, self._holder = store, holder
        self._lost: str | None = None
        self._last_beat = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError when this driver has found out that it owns the output no more."""
        if self._lost is not None:
            raise LeaseLostError(
                f"{self._store.place} belongs to another driver now: {self._lost}; this one stops. "
                "What it committed stays"
            )

    def confirm(self) -> None:
        """Looks for a successor now, then as `check`."""
        self._look()
        self.check()

    def release(self) -> None:
        """Lets the next driver start at once."""
        self._ending.set()
        self._thread.join()
        try:
            self._beat("released")
        except OSError as error:
            log.warning(
                "the lease of %s cannot be released (%s): the next driver will wait",
                self._store.place,
                error,
            )

    def _keep_beating(self) -> None:
        number = 0
        while not self._ending.wait(BEAT_S if number else 0.0):
            number += 1
            try:
                self._beat(number)
                self._look()
                self._last_beat = time.monotonic()
            except OSError as error:
                silent_s = time.monotonic() - self._last_beat
                log.warning(
                    "the lease of %s cannot be renewed for %.0f s: %s",
                    self._store.place,
                    silent_s,
                    error,
                )
                if silent_s > DEAD_AFTER_S - 2 * BEAT_S:  # before others take it over
                    self._lost = f"it was not to be reached for {silent_s:.0f} s ({error})"

    def _beat(self, content: int | str) -> None:
        self._store.write(_beat_name(self._holder.epoch), json.dumps({"beat": content}).encode())

    def _look(self) -> None:
        successor = _holder(self._store, self._holder.epoch + 1)
        if successor is not None:
            self._lost = str(successor)


@contextmanager
def own(store: Store) -> Iterator[Lease]:
    """The lease for the duration of the context. Raises BusyError when a living driver has it."""
    lease = Lease(store, take(store))
    try:
        yield lease
    finally:
        lease.release()


def take(store: Store) -> Holder:
    """Makes this process the owner; waits DEAD_AFTER_S at most for signs of life of another.

    Raises BusyError when it is alive, or when a third one was quicker.
    """
    last = latest_epoch(store)
    if last:
        _await_death(store, last)
    mine = Holder.this_process(last + 1)
    reach("before_lease")
    created = store.create(_epoch_name(mine.epoch), json.dumps(asdict(mine)).encode())
    reach("after_lease")
    # A slow taker may create an epoch whose successors have come and been tidied away: the highest
    # one counts.
    if not created or latest_epoch(store) != mine.epoch:
        raise BusyError(
            f"output: another driver has just started on {store.place}; let it do the job"
        )
    return mine


def latest_epoch(store: Store) -> int:
    """The number of the last epoch, 0 when there was none."""
    names = (entry.name for page in store.pages(FOLDER) for entry in page)
    return max((int(match[1]) for match in map(EPOCH_NAME.fullmatch, names) if match), default=0)


def tidy(store: Store) -> None:
    """Removes the files of past epochs. To be called by the owner."""
    last = latest_epoch(store)
    for epoch in range(last - 1, 0, -1):
        if _holder(store, epoch) is None:
            return
        store.delete(_beat_name(epoch))
        store.delete(_epoch_name(epoch))


def _await_death(store: Store, epoch: int) -> None:
    """Returns when the owner of that epoch is done or dead. Raises BusyError when it lives."""
    holder, beat = _holder(store, epoch), _read(store, _beat_name(epoch))
    if holder is None or json.loads(beat or b"{}").get("beat") == "released":
        return
    alive = holder.is_alive()
    if alive is False:
        return
    begun = time.monotonic()
    if alive is None:
        log.warning(
            "%s was left by %s: waiting up to %.0f s for a sign of life",
            store.place,
            holder,
            DEAD_AFTER_S,
        )
    while alive is None and time.monotonic() - begun < DEAD_AFTER_S:
        time.sleep(POLL_S)
        alive = True if _read(store, _beat_name(epoch)) != beat else None
    if alive:
        raise BusyError(
            f"output: {store.place} is being written by another driver ({holder}); wait for it or "
            "stop it, then run the same command again"
        )


def _holder(store: Store, epoch: int) -> Holder | None:
    data = _read(store, _epoch_name(epoch))
    return Holder(**_known(json.loads(data))) if data else None


def _known(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in Holder.__dataclass_fields__}


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        return b""


def _epoch_name(epoch: int) -> str:
    return f"{FOLDER}/epoch-{epoch:08d}.json"


def _beat_name(epoch: int) -> str:
    return f"{FOLDER}/beat-{epoch:08d}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _boot() -> str:
    """Names this machine's uptime; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    """Containers of one machine share its boot, but number their processes for themselves."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
