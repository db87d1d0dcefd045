"""`glm-batch serve`: start Ray Serve with a configuration's models, wait for a signal, end without
losing a request.

`application` is the same for Ray's own `serve run`. Owns the order of these. What is checked lies
in jobs.serving.serve_config, what runs in glm_actors.serving.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from glm_batch.glm_actors.serving.http.border import digest_of
from glm_batch.glm_actors.serving.openai.serve_settings import ServeSettings
from glm_batch.glm_actors.serving.replicas.deployment import APP_NAME, build_application
from glm_batch.jobs.serving.serve_config import check_settings, load_settings
from glm_batch.models.errors import ConfigError, EngineError

DRAIN_CALL_S = 30.0
# The engine computes on all cores at once: a millisecond that anybody takes from one of them is
# lost on all.
RAY_SETTINGS = {
    # A request does not change threads within a replica; nothing there blocks, and engines have
    # threads of their own.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # instead of 0.1
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",  # instead of 100
    "RAY_enable_metrics_collection": "0",  # Ray's own; ours are at /metrics
}
QUIET: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


def serve(path: str, *, insecure: bool = False) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError before Ray starts, EngineError when a
    model does not load.
    """
    settings, place = load_settings(path)
    token = check_settings(settings, place, insecure=insecure)
    if insecure and settings.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"glm-batch: without a token, everybody who reaches {settings.host} is answered",
            file=sys.stderr,
        )
    from glm_batch.pipelines.cluster.cluster import cluster

    with ExitStack() as ended:
        with _ray_settings():
            ended.enter_context(cluster())
        asked = ended.enter_context(_signals())  # after Ray has set its own
        ingress = start(settings, None if token is None else digest_of(token))
        names = ", ".join(settings.models)
        print(
            f"glm-batch: serving {names} at http://{_shown(settings.host)}:{settings.port}/v1",
            flush=True,
        )
        print(
            f"glm-batch: batch jobs join it: {_ray_place()} glm-batch label JOB --app {APP_NAME}",
            flush=True,
        )
        asked.wait()
        print(
            (
                f"glm-batch: finishing what is being answered, for {settings.limits.drain_s:g} s "
                f"at most"
            ),
            file=sys.stderr,
        )
        stop(ingress, settings.limits.drain_s)


def application(arguments: Mapping[str, str]) -> Any:
    """The application for `serve run glm_batch.jobs.serving.serve:application config=serve.yaml`
    (and `insecure=true`), and for Serve's files.

    Ray's proxy listens where Ray is told to: the configuration's host and port have no part in
    that. Raises ConfigError.
    """
    import ray

    unknown = arguments.keys() - {"config", "insecure"}
    insecure = str(arguments.get("insecure", "false")).lower()
    if unknown or "config" not in arguments or insecure not in ("true", "false"):
        given = ", ".join(f"{name}={value}" for name, value in arguments.items()) or "nothing"
        raise ConfigError(
            f"arguments: {given}; give config=PATH, and insecure=true if nobody shall need a token"
        )
    settings, place = load_settings(arguments["config"])
    token = check_settings(settings, place, insecure=insecure == "true", listens=False)
    if ray.is_initialized():
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    else:
        resources = _of_this_machine()
    return build_application(
        settings, None if token is None else digest_of(token), **_shares(settings, resources)
    )


def start(settings: ServeSettings, token_digest: bytes | None) -> Any:
    """Starts the application on the present cluster; returns the ingress' handle once all models
    are loaded.
    """
    import ray
    from ray import serve as ray_serve

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    built = build_application(
        settings,
        token_digest,
        **_shares(settings, resources),
        listen_on=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
    try:
        return ray_serve.run(built, name=APP_NAME, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        raise EngineError(f"the models cannot be loaded: {error}") from error


def _shares(settings: ServeSettings, resources: Mapping[str, float]) -> dict[str, Any]:
    """What each replica gets of Ray's resources and of a machine's cores."""
    counts = {name: model.replica_range[1] for name, model in settings.models.items()}
    ranks = {
        name: counts[name] * model.engine.tensor_parallel_size
        for name, model in settings.models.items()
    }
    wanted = sum(ranks[name] for name, model in settings.models.items() if model.wants_gpu)
    return {
        "num_cpus": min(1.0, round(resources["CPU"] / (sum(counts.values()) + 1), 3)),
        "num_threads": max(1, (os.cpu_count() or 1) // sum(ranks.values())),
        "use_gpus": resources.get("GPU", 0) >= wanted,
    }


def _of_this_machine() -> dict[str, float]:
    """What Ray will find when it starts here."""
    import torch

    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def stop(ingress: Any, drain_s: float) -> None:
    """Refuses what is new, lets the rest finish within its time, and ends the application."""
    from ray import serve as ray_serve

    unfinished = ingress.drain.remote().result(timeout_s=drain_s + DRAIN_CALL_S)
    if unfinished:
        print(f"glm-batch: {unfinished} requests were not finished in time", file=sys.stderr)
    ray_serve.delete(APP_NAME)


@contextmanager
def _ray_settings() -> Iterator[None]:
    """While the cluster starts: RAY_SETTINGS, for its processes and not for this one, except what
    the user has set.
    """
    given = {name: value for name, value in RAY_SETTINGS.items() if name not in os.environ}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the second of them ends the process at once."""
    asked = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + signum)
        asked.set()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _ray_place() -> str:
    """The environment with which others find this Ray cluster, and what it asks of them."""
    import ray

    mode = os.environ.get("RAY_AUTH_MODE")  # Ray sets it when it starts a cluster
    address = f"RAY_ADDRESS={ray.get_runtime_context().gcs_address}"
    return address if mode is None else f"RAY_AUTH_MODE={mode} {address}"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
