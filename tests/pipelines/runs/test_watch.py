"""The driver's loop: items come through, and a reason to end is seen also while none comes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from glm_batch.pipelines.output.lease import Lease, LeaseLostError
from glm_batch.pipelines.runs.watch import Stop, Watch, watched


class FakeLease(Lease):
    """A lease that is lost when told so."""

    def __init__(self) -> None:
        self.is_lost = False

    def check(self) -> None:
        if self.is_lost:
            raise LeaseLostError("lost")


def silent(gate: threading.Event) -> Iterator[int]:
    yield 1
    gate.wait(20)
    yield 2


def test_all_items_come_through_in_order() -> None:
    assert list(watched(range(1000), lambda: False)) == list(range(1000))


def test_an_error_of_the_items_comes_out() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("of the items")

    items = watched(broken(), lambda: False)
    assert next(items) == 1
    with pytest.raises(ValueError, match="of the items"):
        next(items)


def test_the_end_is_seen_while_no_item_comes() -> None:
    gate, begun = threading.Event(), time.monotonic()
    assert list(watched(silent(gate), lambda: time.monotonic() > begun + 0.3)) == [1]
    assert time.monotonic() - begun < 5
    gate.set()


def test_a_lost_lease_ends_the_wait() -> None:
    gate, lease = threading.Event(), FakeLease()
    items = watched(silent(gate), Watch(lease=lease, stop=Stop()).is_over)
    assert next(items) == 1
    lease.is_lost = True
    with pytest.raises(LeaseLostError):
        next(items)
    gate.set()


def test_a_stop_waits_for_what_was_in_work_and_no_more() -> None:
    watch = Watch(lease=FakeLease(), stop=Stop(grace_s=60))
    watch.expect(3)
    found = []
    for item in watched(range(100), watch.is_over):
        watch.count()
        found.append(item)
        if item == 10:
            watch.stop.ask(signal.SIGTERM)
    assert found == list(range(14))


def test_a_stop_waits_no_longer_than_the_grace_period() -> None:
    gate, watch = threading.Event(), Watch(lease=FakeLease(), stop=Stop(grace_s=0.3))
    watch.expect(3)
    watch.stop.ask(signal.SIGINT)
    begun = time.monotonic()
    assert list(watched(silent(gate), watch.is_over)) == [1]
    assert 0.25 < time.monotonic() - begun < 5
    gate.set()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_time_that_is_over_asks_as_a_signal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("glm_batch.pipelines.runs.watch.time.monotonic", lambda: now[0])
    stop = Stop(grace_s=20.0, seconds=60.0)
    seen = []
    for now[0] in (159.0, 160.0, 179.0, 180.0):
        seen.append((stop.is_asked, stop.is_due))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]
    assert stop.signum is None  # which tells an end that was planned from one that was asked for
