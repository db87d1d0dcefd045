"""What a batch job and a live application tell each other about a model that they share, and their
way to each other through Ray Serve, at both ends. Imports Ray inside functions only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from glm_batch.glm_actors.faults.suspects import NoRestartError
from glm_batch.models.checkpoint.directory import model_digest
from glm_batch.models.engine.api.interface import Engine, EngineConfig
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.version import __version__

MESSAGES = 32
MANY = 10_000  # replicas that may hold a lifeline


class NoReplicaError(Exception):
    """No replica has taken the message."""


class ReplicaLostError(Exception):
    """The replica that had taken the message did not live to answer it."""


class AppFailedError(NoRestartError):
    """The application cannot do the work, whichever process of the job asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What decides answers: the checkpoint's files, these settings, our version."""

    checkpoint: str
    kind: str
    dtype: str
    max_model_len: str
    version: str

    @classmethod
    def of(cls, config: EngineConfig) -> ModelIdentity:
        """Reads samples of the checkpoint's files."""
        kind = "torch" if config.kind == "auto" else config.kind  # as serving has it
        longest = str(config.max_model_len)
        return cls(
            checkpoint=model_digest(config.model),
            kind=kind,
            dtype=config.dtype,
            max_model_len=longest,
            version=__version__,
        )

    def differences(self, other: ModelIdentity) -> list[str]:
        """In which of a job's keys `other`, which is served, is another: for people."""
        if self.version != other.version:
            return [
                f"it runs glm-batch {other.version}, the job {self.version}: use the same "
                "version on both sides"
            ]
        if self.checkpoint != other.checkpoint:
            return ["model: its files are others"]
        both = [(name, value, asdict(other)[name]) for name, value in asdict(self).items()]
        return [
            f"engine.{name}: {mine} in the job, {its} there"
            for name, mine, its in both
            if mine != its
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """A model of a live application: the Ray Serve deployment to ask, what it must be, and how many
    messages of a job may be under way to it.
    """

    app: str
    deployment: str
    identity: ModelIdentity
    messages: int = MESSAGES

    def build_engine(self) -> Engine:
        """For a batch worker. Raises ConfigError where another model is served by now."""
        from glm_batch.glm_actors.shared.shared_engine import SharedEngine

        return SharedEngine(self, RayLine(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """Requests for a replica, to be answered all at once by their completions, in their order.

    A replica with another identity answers with that one instead. `caller` names the process that
    asks.
    """

    caller: str
    identity: ModelIdentity
    requests: Sequence[Request]


Answer = list[Completion] | ModelIdentity


class Line(Protocol):
    """The way to an application's model. Both raise NoReplicaError and ReplicaLostError."""

    async def identity(self) -> ModelIdentity: ...
    async def ask(self, work: BatchWork) -> Answer: ...
    def close(self) -> None: ...


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
        """Done once the lifeline's process has ended. One call is held for each caller."""
        if caller not in self._held:
            self._held[caller] = asyncio.ensure_future(_hold(lifeline))
            self._held[caller].add_done_callback(lambda _: self._held.pop(caller))
        return self._held[caller]


async def _hold(lifeline: Any) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):
        await lifeline.hold.remote()


def _handle(model: SharedModel) -> Any:
    from ray import serve

    return serve.get_deployment_handle(model.deployment, model.app)


@contextlib.contextmanager
def _ray_failures() -> Iterator[None]:
    """Whether a message came to a replica at all; Serve repeats what it knows did not."""
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
