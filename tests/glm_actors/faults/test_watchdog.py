"""A watchdog ends what hangs, also where Python itself is blocked, and lets alone what is merely
slow.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from glm_batch.glm_actors.faults.watchdog import HangLimits, Watchdog

LIMITS = HangLimits(loading_s=3000.0, first_step_s=900.0, step_s=300.0, times=5.0)

HANGING = """
    import ctypes, os, sys, threading, time
    from glm_batch.glm_actors.engines.engine_loop import EngineLoop
    from glm_batch.glm_actors.faults.watchdog import HangLimits, Watchdog
    from glm_batch.models.engine.echo import EchoEngine
    from glm_batch.models.engine.api.request import Classify, Request

    def block():
        {block}

    class Hanging(EchoEngine):
        steps = 0
        def step(self):
            Hanging.steps += 1
            if Hanging.steps == 3:
                block()
            return super().step()

    def end(reason):
        print(reason, flush=True)
        os._exit(70)

    watchdog = Watchdog(HangLimits(loading_s=5.0, first_step_s=5.0, step_s=2.0, times=2.0), end)
    loop = EngineLoop(Hanging, watchdog)
    for turn in range(3):
        loop.submit([Request(id=str(turn), input_ids=[1], work=Classify())]).result()
    print("never reached", flush=True)
"""


def hang(block: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(HANGING).format(block=block)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )


def test_a_step_that_sleeps_ends_the_process_with_its_reason() -> None:
    ended = hang("time.sleep(60)")
    assert ended.returncode == 70
    assert (
        "a step of the engine hangs: it has taken more than 2.0 s (the slowest before took"
        in ended.stdout
    )


def test_a_step_that_blocks_python_itself_ends_too_and_leaves_its_stack() -> None:
    ended = hang("ctypes.PyDLL(None).sleep(60)")
    assert ended.returncode == 1
    assert "in block" in ended.stderr
    assert "never reached" not in ended.stdout


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("glm_batch.glm_actors.faults.watchdog.MAX_POLL_S", 0.01)
    return Clock()


def test_limits_follow_the_slowest_step(clock: Clock) -> None:
    hangs: list[str] = []
    hung = threading.Event()

    def on_hang(reason: str) -> None:
        hangs.append(reason)
        hung.set()

    watchdog = Watchdog(LIMITS, on_hang, clock)

    def pass_seconds(seconds: float) -> None:
        clock.now += seconds
        time.sleep(0.1)  # the watchdog looks

    with watchdog.watch("loading"):
        pass_seconds(2999)
    with watchdog.watch("step"):
        pass_seconds(899)  # as the first one may
    pass_seconds(9000)  # idle
    with watchdog.watch("step"):
        pass_seconds(4400)  # longer than step_s, but not than 5 times the first
    assert not hangs
    with watchdog.watch("step"):
        pass_seconds(5 * 4400 + 1)
        assert hung.wait(10)
    assert hangs == [
        "a step of the engine hangs: it has taken more than 22000.0 s (the slowest before took 4400.0 s)"
    ]
    watchdog.close()


@pytest.mark.parametrize(("what", "limit"), [("loading", 3000), ("step", 900)])
def test_the_first_of_everything_has_a_limit_of_its_own(
    what: str, limit: float, clock: Clock
) -> None:
    hung = threading.Event()
    watchdog = Watchdog(LIMITS, lambda reason: hung.set(), clock)
    with watchdog.watch(what):  # type: ignore[arg-type]
        clock.now += limit - 1
        time.sleep(0.1)
        assert not hung.is_set()
        clock.now += 2
        assert hung.wait(10)
    watchdog.close()
