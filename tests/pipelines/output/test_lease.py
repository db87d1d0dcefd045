"""One driver owns an output: a living one is respected, a dead one is replaced, a replaced one
stops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.output.lease import (
    Holder,
    Lease,
    LeaseLostError,
    latest_epoch,
    own,
    take,
    tidy,
)
from glm_batch.pipelines.storage.storage import LocalStore, S3Store, Store
from tests.s3_faults import new_bucket


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_batch.pipelines.output.lease.BEAT_S", 0.05)
    monkeypatch.setattr("glm_batch.pipelines.output.lease.DEAD_AFTER_S", 0.6)
    monkeypatch.setattr("glm_batch.pipelines.output.lease.POLL_S", 0.02)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        endpoint: str = request.getfixturevalue("s3_server")
        return S3Store(f"s3://{new_bucket(endpoint)}/out", StorageSection(endpoint_url=endpoint))
    local = LocalStore(tmp_path)
    local.prepare(["tmp", "lease"])
    return local


def leave(store: Store, epoch: int = 1, **changes: Any) -> Holder:
    """The record of an owner that is not this process."""
    holder = replace(Holder.this_process(epoch), **changes)
    store.create(f"lease/epoch-{epoch:08d}.json", json.dumps(asdict(holder)).encode())
    return holder


def seconds(work: Any) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def check_for_a_while(lease: Lease) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        lease.check()
        time.sleep(0.01)


def test_a_released_lease_is_free_at_once(store: Store) -> None:
    for epoch in (1, 2, 3):
        with own(store):
            assert latest_epoch(store) == epoch


def test_a_living_driver_is_respected_and_named(store: Store) -> None:
    with (
        own(store),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} of .* on .*, since 20.*stop it"),
    ):
        take(store)


def test_a_driver_on_another_machine_is_respected_while_it_beats(store: Store) -> None:
    leave(store, boot="another")
    beats = iter(range(10**6))

    class Beating:
        """Each look finds another beat."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def read(self, name: str) -> bytes:
            return (
                json.dumps({"beat": next(beats)}).encode() if "beat" in name else store.read(name)
            )

    with pytest.raises(ConfigError, match="is being written by another driver"):
        take(Beating())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"boot": "another"}, {"namespace": "another container"}, {"boot": ""}]
)
def test_a_driver_that_may_live_elsewhere_is_replaced_when_it_stays_silent(
    store: Store, changes: dict[str, str]
) -> None:
    leave(store, **changes)
    assert seconds(lambda: take(store)) > 0.5
    assert latest_epoch(store) == 2


def test_a_process_that_is_provably_gone_is_replaced_at_once(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave(store, pid=child.pid, started="12345")
    assert seconds(lambda: take(store)) < 0.5


def test_a_process_that_got_the_number_of_a_dead_one_is_another(store: Store) -> None:
    leave(store, started="1")
    assert seconds(lambda: take(store)) < 0.5


def test_clocks_do_not_matter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(store, boot="another", since="2999-01-01T00:00:00Z")
    monkeypatch.setattr("time.time", lambda: 0.0)
    take(store)
    assert latest_epoch(store) == 2


def test_a_driver_that_was_replaced_finds_out(store: Store) -> None:
    with own(store) as lease:
        lease.confirm()
        successor = leave(store, epoch=2, pid=4711)
        with pytest.raises(LeaseLostError, match="process 4711"):
            check_for_a_while(lease)
        with pytest.raises(LeaseLostError, match=successor.since):
            lease.confirm()


def test_a_driver_that_cannot_renew_its_lease_gives_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.prepare(["tmp", "lease"])
    with own(store) as lease:
        monkeypatch.setattr(LocalStore, "write", _full)
        with pytest.raises(LeaseLostError, match="No space left"):
            check_for_a_while(lease)
        monkeypatch.undo()


def _full(store: LocalStore, name: str, data: bytes) -> None:
    raise OSError(28, "No space left on device")


def test_a_taker_that_was_too_slow_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw epoch 1, and creates epoch 2 after epoch 3 has come and epoch 2 was tidied away."""
    leave(store, epoch=1, started="1")
    looks = iter([1])
    monkeypatch.setattr(
        "glm_batch.pipelines.output.lease.latest_epoch",
        lambda store: next(looks, None) or latest_epoch(store),
    )
    leave(store, epoch=3)
    with pytest.raises(ConfigError, match="another driver has just started"):
        take(store)


def test_past_epochs_are_tidied_away(store: Store) -> None:
    for _ in range(3):
        with own(store):
            pass
    with own(store):
        tidy(store)
        names = sorted(entry.name for page in store.pages("lease") for entry in page)
        assert [name for name in names if "epoch" in name] == ["lease/epoch-00000004.json"]
