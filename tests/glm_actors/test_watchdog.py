"""A watchdog ends what hangs, also where Python itself is blocked, and lets alone what is merely slow."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from glm_actors.watchdog import HangLimits, Watchdog

SHORT = HangLimits(loading_s=0.6, first_step_s=0.6, step_s=0.2, times=5.0)

HANGING = """
    import ctypes, os, sys, threading, time
    from glm_actors.loop import EngineLoop
    from glm_actors.watchdog import HangLimits, Watchdog
    from models.engine.echo import EchoEngine
    from models.engine.request import Classify, Request

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

    watchdog = Watchdog(HangLimits(loading_s=3.0, first_step_s=3.0, step_s=0.5, times=5.0), end)
    loop = EngineLoop(Hanging, watchdog)
    for turn in range(3):
        loop.submit([Request(id=str(turn), input_ids=[1], work=Classify())]).result()
    print("never reached", flush=True)
"""


def hang(block: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(HANGING).format(block=block)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)


def test_a_step_that_sleeps_ends_the_process_with_its_reason() -> None:
    ended = hang("time.sleep(60)")
    assert ended.returncode == 70
    assert "a step of the engine hangs: it has taken more than 0.5 s (the slowest before took 0.0 s)" in ended.stdout


def test_a_step_that_blocks_python_itself_ends_too_and_leaves_its_stack() -> None:
    ended = hang("ctypes.PyDLL(None).sleep(60)")
    assert ended.returncode == 1
    assert "in block" in ended.stderr
    assert "never reached" not in ended.stdout


def test_limits_follow_the_slowest_step() -> None:
    hangs: list[str] = []
    hung = threading.Event()

    def on_hang(reason: str) -> None:
        hangs.append(reason)
        hung.set()

    watchdog = Watchdog(SHORT, on_hang)
    with watchdog.watch("loading"):
        time.sleep(0.4)
    with watchdog.watch("step"):
        time.sleep(0.4)  # as the first one may
    with watchdog.watch("step"):
        time.sleep(0.6)  # longer than step_s, but only half as long again as the first
    time.sleep(0.4)  # idle
    assert not hangs
    with watchdog.watch("step"):
        assert hung.wait(10)
    assert len(hangs) == 1
    assert "more than 3." in hangs[0]
    watchdog.close()


@pytest.mark.parametrize("what", ["loading", "step"])
def test_the_first_of_everything_has_a_limit_of_its_own(what: str) -> None:
    hung = threading.Event()
    watchdog = Watchdog(SHORT, lambda reason: hung.set())
    with watchdog.watch(what):  # type: ignore[arg-type]
        begun = time.monotonic()
        assert hung.wait(10)
        assert 0.5 < time.monotonic() - begun < 5
    watchdog.close()
