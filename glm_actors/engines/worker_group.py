"""The ranks of one replica: this process is rank 0, the others are Ray actors on its node, and all
end together.

The model's actor asks Ray for what all its ranks need, in one piece: so a group is packed strictly,
Ray Data counts it as what it takes, and its share is free the moment it ends. The other ranks ask
for nothing and use that share. A rank that dies, fails or does not answer is told to `on_loss`,
which ends this process; each other rank sees that and ends too. Whoever starts this process again
forms the group anew.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glm_batch.models.engine.api.interface import Engine, EngineConfig

Backend = Literal["gloo", "nccl"]
# What a rank takes over from rank 0's process before it loads torch.
INHERITED = (
    "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
ORPHAN_EXIT_CODE = 71
# Ranks that a loss leaves behind fail by themselves within moments: told together, what happened
# first is among them.
SETTLE_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """Seconds. A loaded rank that has not answered for `silence_s` is taken for dead.

    Answers come from a thread of their own: a rank that computes answers, one that the system has
    stopped does not. That a step hangs is noticed by the watchdog. `reason_s` is how long a start
    that fails on one rank may take to fail on the others.
    """

    poll_s: float = 1.0
    silence_s: float = 20.0
    reason_s: float = 10.0


def needs_ranks(config: EngineConfig) -> bool:
    """Whether the engine runs on ranks of ours."""
    return config.tensor_parallel_size > 1 and config.kind in ("auto", "torch")


class Rank:
    """The actor of a rank. `environment` is set (None: unset) before torch is loaded."""

    def __init__(self, environment: Mapping[str, str | None]) -> None:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def ping(self) -> None:
        """Answers."""

    def serve(
        self,
        config: EngineConfig,
        host: str,
        port: int,
        rank: int,
        backend: Backend,
        leader_pid: int,
    ) -> None:
        """Joins the group and follows until rank 0 closes it. Raises what ends it before that."""
        _end_with(leader_pid)
        from glm_batch.models.engine.execution import ranks
        from glm_batch.models.network.layers.parallel import join

        ranks.serve(
            config, join(host, port, rank=rank, size=config.tensor_parallel_size, backend=backend)
        )


class WorkerGroup:
    """Ranks 1 to n - 1 of a replica, from their start to the end of this process."""

    def __init__(
        self,
        config: EngineConfig,
        on_loss: Callable[[str], None],
        limits: GroupLimits | None = None,
    ) -> None:
        self._config, self._on_loss = config, on_loss
        self._limits = limits or GroupLimits()
        self._actors: dict[int, Any] = {}
        self._serving: dict[int, Any] = {}
        self._ended = threading.Event()  # the start, whether well or not
        self._running = False

    def build_engine(self) -> Engine:
        """Starts the ranks and loads the model on all of them.

        Raises ConfigError for what cannot run, RuntimeError where it cannot be loaded, with each
        rank's reason.
        """
        from glm_batch.models.checkpoint.config_reader import load_config
        from glm_batch.models.engine import build_engine
        from glm_batch.models.network.layers.parallel import Rendezvous, check_parts

        check_parts(load_config(self._config.model), self._config.tensor_parallel_size)
        backend, meeting = _backend(self._config), Rendezvous()
        try:
            self._start(meeting.host, meeting.port, backend)
            engine = build_engine(
                self._config, meeting.join(self._config.tensor_parallel_size, backend)
            )
            self._running = True
            return engine
        except RuntimeError as error:
            raise RuntimeError(f"rank 0: {error}; {self._reasons(wait=True)}") from error
        finally:
            self._ended.set()
            if not self._running:
                self._kill()

    def _start(self, host: str, port: int, backend: Backend) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor_class = ray.remote(Rank).options(
            num_cpus=0, max_restarts=0, max_concurrency=2, scheduling_strategy=here
        )
        environment = {name: os.environ.get(name) for name in INHERITED}
        for rank in range(1, self._config.tensor_parallel_size):
            actor: Any = actor_class.remote(environment)
            self._actors[rank] = actor
            self._serving[rank] = actor.serve.remote(
                self._config, host, port, rank, backend, os.getpid()
            )
        # The thread keeps this object, and so the actors.
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _kill(self) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def _watch(self) -> None:
        """Until a rank is lost, or all have ended well because rank 0 closed the group."""
        import ray
        from ray.exceptions import RayActorError

        silence = _Silence(self._actors)
        open_ranks = list(self._serving.values())
        while open_ranks:
            ended, open_ranks = ray.wait(
                open_ranks, num_returns=len(open_ranks), timeout=self._limits.poll_s
            )
            failures = [failure for served in ended if (failure := _failure(served))]
            if failures:
                died = any(isinstance(failure, RayActorError) for failure in failures)
                # What one rank raises at the start, others raise too: rank 0 tells it better, if it
                # comes to that.
                if died or not self._ended.wait(self._limits.reason_s) or self._running:
                    self._on_loss(self._reasons())
                return
            if self._running and (silent := silence.after(self._limits.silence_s)):
                self._on_loss(
                    f"rank {silent} has not answered for {self._limits.silence_s:.0f} s: it is "
                    "stopped"
                )
                return

    def _reasons(self, *, wait: bool = False) -> str:
        """How the ranks ended that have failed."""
        import ray

        if wait and self._serving:
            ray.wait(list(self._serving.values()), timeout=self._limits.reason_s)
        time.sleep(SETTLE_S)
        ended, _ = ray.wait(list(self._serving.values()), num_returns=len(self._serving), timeout=0)
        failures = {
            rank: _failure(served) for rank, served in self._serving.items() if served in ended
        }
        told = [f"rank {rank} {_words(failure)}" for rank, failure in failures.items() if failure]
        return "; ".join(told) or "the other ranks are well"


class _Silence:
    """Asks each rank whether it is there, again when it has answered."""

    def __init__(self, actors: Mapping[int, Any]) -> None:
        self._actors = actors
        self._asked: dict[int, tuple[Any, float]] = {}

    def after(self, seconds: float) -> int | None:
        """A rank that has not answered for so long."""
        import ray

        now = time.monotonic()
        for rank, actor in self._actors.items():
            asked = self._asked.get(rank)
            if asked is None or ray.wait([asked[0]], timeout=0)[0]:
                self._asked[rank] = actor.ping.remote(), now
            elif now - asked[1] > seconds:
                return rank
        return None


def _failure(served: Any) -> Exception | None:
    """What a rank that has ended was ended by; None where all was well."""
    import ray

    try:
        ray.get(served)
    except Exception as error:  # the border to another process: whatever it was is told
        return error
    return None


def _words(failure: Exception) -> str:
    from ray.exceptions import RayActorError

    if isinstance(failure, RayActorError):
        return "died: its process was killed or crashed"
    cause = getattr(failure, "cause", None) or failure
    return f"failed: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"


def _backend(config: EngineConfig) -> Backend:
    from glm_batch.models.engine.execution.settings import resolve_device

    return "nccl" if resolve_device(config.device).type == "cuda" else "gloo"


def _end_with(pid: int) -> None:
    """Ends this process when that one, of the same machine, ends: also if it waits for it in native
    code.

    Ray ends the actors of an actor that died too, but later. Where the system has no handles for
    processes, Ray alone does.
    """
    if sys.platform != "linux":
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(ORPHAN_EXIT_CODE)

    def wait() -> None:
        select.select([process], [], [])
        os._exit(ORPHAN_EXIT_CODE)

    threading.Thread(target=wait, name="rank-0", daemon=True).start()
