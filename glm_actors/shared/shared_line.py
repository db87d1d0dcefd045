"""The way to a live application's model through Ray Serve, at both of its ends.

Owns what Ray's errors mean to who asks, and how a replica sees that the process that asked is gone.
Imports Ray inside functions only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from glm_batch.glm_actors.shared.shared_engine import SharedEngine
from glm_batch.glm_actors.shared.shared_model import (
    Answer,
    BatchWork,
    ModelIdentity,
    NoReplicaError,
    ReplicaLostError,
    SharedModel,
)
from glm_batch.models.engine.api.interface import Engine

MANY = 10_000  # replicas that may hold a lifeline


class Lifeline:
    """An actor that ends with the process that has started it, and with it every call of `hold`."""

    async def hold(self) -> None:
        await asyncio.Event().wait()


class RayLine:
    """The Line of this process."""

    def __init__(self, model: SharedModel) -> None:
        import ray

        self._model = model
        self._handle: Any = None
        self._lifeline: Any = (
            ray.remote(Lifeline).options(num_cpus=0, max_concurrency=MANY).remote()
        )
        self._kill = ray.kill

    async def identity(self) -> ModelIdentity:
        found: ModelIdentity = await self._call("identity")
        return found

    async def ask(self, work: BatchWork) -> Answer:
        found: Answer = await self._call("work", work, self._lifeline)
        return found

    def close(self) -> None:
        self._kill(self._lifeline)

    async def _call(self, method: str, *arguments: Any) -> Any:
        with _ray_failures():
            try:
                if self._handle is None:
                    self._handle = await asyncio.to_thread(_handle, self._model)
                response = getattr(self._handle, method).remote(*arguments)
                try:
                    return await response
                except asyncio.CancelledError:
                    response.cancel()
                    raise
            except Exception:
                # that of an application that was deleted stays bad when it comes back
                self._handle = None
                raise


class Callers:
    """At a replica: which processes that have asked for something are still there."""

    def __init__(self) -> None:
        self._held: dict[str, asyncio.Task[None]] = {}

    def gone(self, caller: str, lifeline: Any) -> asyncio.Future[None]:
        """Done once the lifeline's process has ended. One call is held for all of a caller's
        messages.
        """
        if caller not in self._held:
            self._held[caller] = asyncio.ensure_future(_hold(lifeline))
            self._held[caller].add_done_callback(lambda _: self._held.pop(caller))
        return self._held[caller]


def connect(model: SharedModel) -> Engine:
    """The engine of a batch worker. Raises ConfigError where the application serves another model
    by now.
    """
    return SharedEngine(model, RayLine(model))


async def _hold(lifeline: Any) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        await lifeline.hold.remote()


def _handle(model: SharedModel) -> Any:
    from ray import serve

    return serve.get_deployment_handle(model.deployment, model.app)


@contextlib.contextmanager
def _ray_failures() -> Iterator[None]:
    """Whether a message came to a replica at all. Serve itself sends it to another one where it
    knows it did not.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except RayServeException as error:
        raise NoReplicaError(str(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, NoReplicaError):  # the replica is about to be replaced
            raise NoReplicaError(str(error.cause)) from error
        raise ReplicaLostError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise ReplicaLostError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
