"""Deployment: an ingress that speaks HTTP and one deployment for each model, as a Ray Serve
application.

Owns what Ray needs to know: resources, queue lengths, autoscaling, health checks. Imports Ray
inside functions only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from glm_batch.glm_actors.ray_private import bind_replicas_to
from glm_batch.glm_actors.serving.http.pieces import Address, Mailbox, Outlets, Piece
from glm_batch.glm_actors.serving.openai.api_errors import ApiError, busy, unavailable
from glm_batch.glm_actors.serving.openai.protocol import Body
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
from glm_batch.glm_actors.shared.shared_model import Answer, BatchWork, Callers, ModelIdentity
from glm_batch.glm_actors.units.model_actor import CPU_SETTINGS
from glm_batch.models.request_limits import RequestLimits

if TYPE_CHECKING:
    from glm_batch.glm_actors.serving.http.listener import Listener

APP_NAME = "glm-batch"
MODEL_PREFIX = "model-"
CONSTRUCTOR_RETRIES = 3
DRAIN_POLL_S = 0.2
LOOPBACK = "127.0.0.1"
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
NODE_SHARE = 0.001  # of what Ray has one of on each node, to name the node
PROBE_TIMEOUT_S = 10.0
# requests of a replica that come on top of its queue only to hear that it is full
ROUTER_SLACK = 64
LOOK_BACK_S = 12.0  # Ray hears of queues every 10 s
UPSCALE_S = 5.0  # a queue must be long for; Ray's own 30 s are a long time to wait for an answer
TARGET_SHARE = 0.5  # of a replica's queue; beyond it another replica starts
Json = dict[str, Any]


class ModelDeployment:
    """A Replica in Ray Serve. Errors are returned: what is raised Ray would log as its own."""

    def __init__(self, model: ServedModel, caps: RequestLimits, num_threads: int) -> None:
        # Ray limits a worker to as many threads as its logical CPUs; this must be set before torch
        # is imported.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        for name, value in CPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        from glm_batch.glm_actors.serving.replicas.replica import Replica

        _keep_to_loopback()
        self._replica = Replica(model, caps)
        self._outlets = Outlets()
        self._callers = Callers()

    async def answer(self, body: Body) -> Json | ApiError:
        try:
            return await self._replica.answer(body)
        except ApiError as error:
            return error

    async def feed(self, body: Body, address: Address, number: int) -> ApiError | None:
        """Sends the response piece by piece to the Mailbox at `address`, as its stream `number`."""
        try:
            outlet = await self._outlets.to(address)
            with outlet.stream(number) as give:
                await self._replica.feed(body, give)
        except ApiError as error:
            return error
        return None

    async def identity(self) -> ModelIdentity:
        return self._replica.identity

    async def work(self, work: BatchWork, lifeline: Any) -> Answer:
        """For batch jobs: see glm_actors.shared.shared_model."""
        return await self._replica.work(work, self._callers.gone(work.caller, lifeline))

    async def stats(self) -> Json:
        return await self._replica.stats()

    async def check_blocks(self) -> None:
        await self._replica.check_blocks()

    async def check_health(self) -> None:
        """Ray Serve calls this, and replaces the replica when it raises."""
        await self._replica.check_health()


class Ingress:
    """The HTTP process. Its application is built where it runs."""

    def __init__(
        self,
        caps: RequestLimits,
        token_digest: bytes | None,
        replicas: Mapping[str, int],
        *handles: Any,
    ) -> None:
        """`replicas` are the most that each model may have; `handles` are the models' in that
        order.
        """
        import ray

        from glm_batch.glm_actors.serving.http.http_app import build_app

        _keep_to_loopback()
        self._caps = caps
        self._listener: Listener | None = None
        here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        backend = RayBackend(dict(zip(replicas, handles, strict=True)), replicas, here)
        self._border = build_app(backend, caps, token_digest)

    async def reconfigure(self, address: Mapping[str, Any]) -> None:
        """Ray Serve calls this with the deployment's user_config, if it has one: where to listen,
        beside Ray's proxy.

        One process less for every byte to go through.
        """
        from glm_batch.glm_actors.serving.http.listener import Listener

        former, self._listener = (
            self._listener,
            Listener(self._border, address["host"], address["port"]),
        )
        await self._listener.start()
        if former is not None:  # what it is answering goes on
            self._leaving = asyncio.ensure_future(former.close())

    async def __del__(self) -> None:
        """Ray Serve calls this once another ingress has taken this one's place, and waits drain_s
        for it to return.

        Both listen at the same address until then: nobody finds it closed.
        """
        if self._listener is not None and not self._border.draining:
            await self._listener.close()

    def __serve_build_asgi_app__(self) -> Any:
        return self._border

    async def drain(self) -> int:
        """Refuses what is new. How many requests are still not answered after drain_s."""
        self._border.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._caps.drain_s):
                while self._border.num_active:
                    await asyncio.sleep(DRAIN_POLL_S)
        return self._border.num_active


class RayBackend:
    """The Backend whose models are Ray Serve deployments."""

    def __init__(self, handles: Mapping[str, Any], replicas: Mapping[str, int], host: str) -> None:
        """`host` is this machine's address within the cluster."""
        self._handles, self._replicas = handles, replicas
        self._mailbox = Mailbox(host)

    @property
    def models(self) -> list[str]:
        return list(self._handles)

    async def answer(self, model: str, body: Body) -> Json:
        response = self._handles[model].answer.remote(body)
        try:
            with _ray_failures():
                found: Json | ApiError = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        if isinstance(found, ApiError):
            raise found
        return found

    async def stream(self, model: str, body: Body) -> AsyncIterator[Piece]:
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        address = await self._mailbox.address()
        with self._mailbox.box(pieces.put_nowait) as number:
            response = self._handles[model].feed.remote(body, address, number)
            feeding = asyncio.ensure_future(_fed(response))
            # Only a failure ends the stream: the last pieces may come after Ray's word that all is
            # done.
            feeding.add_done_callback(
                lambda done: pieces.put_nowait(None) if _has_failed(done) else None
            )
            try:
                while (piece := await pieces.get()) is not None:
                    yield piece
                    if piece.usage is not None:
                        break
                await feeding
            finally:
                if not feeding.done():
                    response.cancel()
                    feeding.cancel()

    async def stats(self) -> dict[str, list[Json]]:
        """Ray's router picks the replicas: one that is missed is heard of another time."""
        asked = {
            name: [self._probe(name) for _ in range(most)] for name, most in self._replicas.items()
        }
        return {
            name: [found for found in await asyncio.gather(*probes) if found]
            for name, probes in asked.items()
        }

    async def is_healthy(self) -> bool:
        return all(await asyncio.gather(*(self._probe(name) for name in self._handles)))

    async def _probe(self, name: str) -> Json | None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                with _ray_failures():
                    found: Json = await self._handles[name].stats.remote()
                    return found
        except (ApiError, TimeoutError):
            return None


async def _fed(response: Any) -> None:
    with _ray_failures():
        found: ApiError | None = await response
    if found is not None:
        raise found


def _has_failed(done: asyncio.Future[None]) -> bool:
    return done.cancelled() or done.exception() is not None


@contextlib.contextmanager
def _ray_failures() -> Any:
    """What Ray raises when a replica is full, gone or cannot answer, as the client hears it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, RayServeException

    try:
        yield
    except BackPressureError:
        raise busy() from None
    except (RayError, RayServeException) as error:
        raise unavailable() from error


def _keep_to_loopback() -> None:
    """On a cluster that is this machine alone no replica needs to listen on all interfaces."""
    import ray.util

    if ray.util.get_node_ip_address() == LOOPBACK:  # type: ignore[no-untyped-call]
        bind_replicas_to(LOOPBACK)


def build_application(
    settings: ServeSettings,
    token_digest: bytes | None,
    *,
    num_cpus: float,
    num_threads: int,
    use_gpus: bool = False,
    listen_on: str | None = None,
) -> Any:
    """The Ray Serve application. `num_cpus` are what Ray counts for a replica; with `use_gpus` each
    rank has one.

    On the node with the IP address `listen_on` it listens for itself, at the settings' host and
    port. Without that, as under `serve run`, it is reached through Ray's proxy.
    """
    from ray import serve

    deployment: Any = serve.deployment  # whose annotations know of decorators alone
    caps = settings.limits
    bound = []
    for name, model in settings.models.items():
        options: dict[str, Any] = {
            "name": deployment_name(name),
            "max_ongoing_requests": caps.max_queue + ROUTER_SLACK,
            "max_queued_requests": caps.max_queue,
            "ray_actor_options": {
                "num_cpus": num_cpus,
                "num_gpus": _num_gpus(model) if use_gpus else 0,
            },
            "max_constructor_retry_count": CONSTRUCTOR_RETRIES,
            "health_check_period_s": HEALTH_PERIOD_S,
            "health_check_timeout_s": HEALTH_TIMEOUT_S,
            "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
            "graceful_shutdown_timeout_s": caps.drain_s,
            **_scaling(model, caps),
        }
        bound.append(deployment(ModelDeployment).options(**options).bind(model, caps, num_threads))
    most = {name: model.replica_range[1] for name, model in settings.models.items()}
    ingress = deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        max_ongoing_requests=(caps.max_queue + ROUTER_SLACK) * sum(most.values()) * 2,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {f"node:{listen_on}": NODE_SHARE} if listen_on else {},
        },
        user_config={"host": settings.host, "port": settings.port} if listen_on else None,
        max_surge_percent=100,  # the next one is there before this one goes
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=caps.drain_s,
    )
    return ingress.bind(caps, token_digest, most, *bound)


def _num_gpus(model: ServedModel) -> int:
    return model.engine.tensor_parallel_size if model.wants_gpu else 0


def _scaling(model: ServedModel, caps: RequestLimits) -> dict[str, Any]:
    least, most = model.replica_range
    if least == most:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": max(1.0, caps.max_queue * TARGET_SHARE),
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_S,
        }
    }


def deployment_name(model: str) -> str:
    """Ray has its own use for some characters."""
    return MODEL_PREFIX + "".join(c if c.isalnum() or c in "-_." else "_" for c in model)
