"""What several test folders share: one small Ray cluster for the whole session, and a checkpoint
without weights.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before Ray starts, so that its workers have them: no test may reach a real store, or wait for one.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes beside each other: with a team of threads each, all would wait for cores again
    # and again.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parent
LONG_FOLDERS = ("glm_actors/serving", "faults", "jobs", "pipelines")
# What `make check` leaves out: tests that start Ray, a server or a browser, alone or in a process of
# their own, kill processes, or wait.
SLOW_FIXTURES = {"ray_cluster", "s3_server", "server", "own_server", "replica"}
SLOW_MARKS = ("slow", "waits", "browser", "faults", "gpu")
SLOW_PLACES = (
    "faults",
    "glm_actors/serving",
    "jobs",
    "pipelines/cron/test_cron_nights.py",
    "pipelines/openai_batch",
    "pipelines/output/test_crashes.py",
    "pipelines/output/test_lease.py",
    "pipelines/runs/test_pipeline.py",
    "benchmarks",
    "packaging",
)
EXAMPLES = TESTS.parent / "examples"
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 320,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray for every test that needs one; starting it costs seconds."""
    import ray

    ray.init(
        num_cpus=3,
        object_store_memory=160 << 20,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},  # for the one test that reads them
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def echo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, chat template and config.json, but no weights: enough for engine.kind echo."""
    spec = importlib.util.spec_from_file_location("tiny_tokenizer", EXAMPLES / "tiny_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    tiny_tokenizer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_tokenizer)
    folder = tmp_path_factory.mktemp("echo_checkpoint")
    texts = ["Which shape is this? It is a red circle, square or triangle."] * 3
    tiny_tokenizer.save_tokenizer(tiny_tokenizer.train_tokenizer(texts, 300), folder, 256)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 store in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives whole files to the test processes, and all of tests/glm_actors/serving to one of them:
    it starts the server once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return (
                "tests/glm_actors/serving" if file.startswith("tests/glm_actors/serving/") else file
            )

    return Folders(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is quick. Begins with the folders that take long, so that test processes end
    together.

    Leaves out what needs a GPU where there is none; Triton's interpreter stands in for one.
    """
    for item in items:
        if _is_quick(item):
            item.add_marker("quick")
    items.sort(
        key=lambda item: [item.path.is_relative_to(TESTS / folder) for folder in LONG_FOLDERS],
        reverse=True,
    )
    if os.environ.get("TRITON_INTERPRET") == "1" or not any(
        item.get_closest_marker("gpu") for item in items
    ):
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(
            items=[item for item in items if item.get_closest_marker("gpu")]
        )
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def _is_quick(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return not (
        SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        or any(item.get_closest_marker(mark) for mark in SLOW_MARKS)
        or any(item.path.is_relative_to(TESTS / place) for place in SLOW_PLACES)
        or "s3" in str(parameters.get("store"))
    )
