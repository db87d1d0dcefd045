"""A group of ranks ends as a whole, soon, with a reason, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from glm_batch.glm_actors.engines.worker_group import GroupLimits, Rank, WorkerGroup, needs_ranks
from glm_batch.models.engine import EngineConfig, Generate, Request, SamplingParams
from glm_batch.models.errors import ConfigError
from tests.ray_processes import NewProcesses

CHECKPOINT = Path(__file__).parents[3] / "examples" / "tiny_glm"
LIMITS = GroupLimits(poll_s=0.2, silence_s=3.0, reason_s=3.0)


def config(ranks: int, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model=str(CHECKPOINT),
        tensor_parallel_size=ranks,
        device="cpu",
        dtype="float32",
        kv_cache_tokens=1024,
        **changes,
    )


def leader(reason: Path, ranks: int, rank_class: type | None = None) -> Any:
    """An actor that is rank 0. What it is told of a loss goes to the file `reason`, and then it
    ends.
    """
    import ray

    class Leader:
        def __init__(self) -> None:
            if rank_class:
                import glm_batch.glm_actors.engines.worker_group

                glm_batch.glm_actors.engines.worker_group.Rank = rank_class  # type: ignore[misc]
            self.engine = WorkerGroup(config(ranks), self.lose, LIMITS).build_engine()

        def lose(self, text: str) -> None:
            reason.write_text(text)
            os._exit(1)

        def answer(self) -> tuple[int, ...]:
            work = Generate(sampling=SamplingParams(max_tokens=4, ignore_eos=True))
            self.engine.submit([Request(id="r", input_ids=[5, 6, 7], work=work)])
            while not (done := self.engine.step()):
                pass
            return done[0].outputs[0].token_ids

        def close(self) -> None:
            self.engine.close()

    return ray.remote(Leader).options(num_cpus=0).remote()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.05)
    return time.monotonic() - begun


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_rank_ends_its_group(tmp_path: Path) -> None:
    import ray

    reason, ranks = tmp_path / "reason", NewProcesses("ray::Rank")
    first = leader(reason, 2)
    tokens = ray.get(first.answer.remote())
    assert len(tokens) == 4
    (rank_1,) = ranks()
    os.kill(rank_1.pid, signal.SIGSTOP)
    waiting = first.answer.remote()
    wait_for(reason.exists, 30)
    assert "has not answered for 3 s: it is stopped" in reason.read_text()
    with suppress(ray.exceptions.RayError):
        ray.get(waiting)
    wait_for(lambda: not ranks(), 30)

    again = leader(reason, 2)
    assert ray.get(again.answer.remote()) == tokens
    ray.get(again.close.remote())
    reason.unlink()
    ray.kill(again)
    wait_for(lambda: not ranks(), 30)
    assert not reason.exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    class Full(Rank):
        def serve(self, *arguments: Any) -> None:
            raise MemoryError("no room on this device")

    reason, ranks = tmp_path / "reason", NewProcesses("ray::Rank")
    starting = leader(reason, 2, Full)
    wait_for(reason.exists)
    del starting
    assert "rank 1 failed: MemoryError: no room on this device" in reason.read_text()
    wait_for(lambda: not ranks(), 30)


def test_what_cannot_be_dealt_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3: .* use 1, 2, 4"):
        WorkerGroup(config(3), lambda reason: None).build_engine()


def test_only_our_own_engine_has_ranks() -> None:
    assert needs_ranks(config(2))
    assert not needs_ranks(config(1))
    assert not needs_ranks(config(2, kind="echo"))
