"""An engine whose other ranks are threads of this process: they exchange over gloo as processes do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm_batch.models.engine import EngineConfig
from glm_batch.models.engine.execution.ranks import serve
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.network.layers.parallel import Rendezvous, join


@contextmanager
def parallel_engine(path: Path, size: int, **config: Any) -> Iterator[TorchEngine]:
    """A TorchEngine on `size` ranks; every thread must end with it and without an exception."""
    setup = EngineConfig(
        model=str(path), tensor_parallel_size=size, **({"kv_cache_tokens": 4096} | config)
    )
    if size == 1:
        yield TorchEngine.from_checkpoint(setup)
        return
    meeting = Rendezvous()
    failures: list[BaseException] = []

    def follow(rank: int) -> None:
        try:
            serve(setup, join(meeting.host, meeting.port, rank=rank, size=size, backend="gloo"))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [
        threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, size)
    ]
    for thread in threads:
        thread.start()
    engine = TorchEngine.from_checkpoint(setup, meeting.join(size, "gloo"))
    try:
        yield engine
    finally:
        engine.close()
        for thread in threads:
            thread.join(20)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
