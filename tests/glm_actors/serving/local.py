"""A server of this process: the whole application behind a socket, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvicorn

from glm_batch.glm_actors.serving.http.border import digest_of
from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import TOKEN, LocalBackend

START_S = 60.0


@contextmanager
def serving(replicas: Mapping[str, Replica], caps: RequestLimits) -> Iterator[str]:
    """The URL at which models are served by name while the block runs."""
    app = build_app(LocalBackend(replicas), caps, digest_of(TOKEN))
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
