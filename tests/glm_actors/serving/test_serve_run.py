"""The application under Ray's own command line, once; and what its builder refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from ray import serve

from glm_batch.jobs.serving.serve import application
from glm_batch.models.errors import ConfigError
from tests.glm_actors.serving.conftest import MODEL, ROOT, TINY, TOKEN

START_S = 240.0


def config_file(folder: Path, **keys: Any) -> str:
    path = folder / "serve.yaml"
    path.write_text(
        yaml.safe_dump({"models": {MODEL: {"model": TINY, "engine": {"dtype": "float32"}}}} | keys)
    )
    return str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_serve_run(tmp_path: Path) -> None:
    port = free_port()
    arguments = {"config": config_file(tmp_path, token_env="GLM_TEST_TOKEN")}
    applications = [
        {
            "name": "glm",
            "import_path": "glm_batch.jobs.serving.serve:application",
            "args": arguments,
        }
    ]
    ray_file = tmp_path / "ray.yaml"
    options = {"host": "127.0.0.1", "port": port}
    ray_file.write_text(yaml.safe_dump({"http_options": options, "applications": applications}))
    environment = os.environ | {
        "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "GLM_TEST_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("serve")), "run", str(ray_file)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=take_interrupts,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=60.0
        )
        assert [model.id for model in client.models.list()] == [MODEL]
        asked: dict[str, Any] = {
            "model": MODEL,
            "prompt": "Where is",
            "temperature": 0,
            "max_tokens": 8,
        }
        whole = client.completions.create(**asked).choices[0].text
        assert (
            "".join(
                chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)
            )
            == whole
        )
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def take_interrupts() -> None:
    """A shell's background job ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(url, timeout=10.0).json() == {"status": "ok"}:
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.5)


def test_the_builder_takes_the_same_configuration(tmp_path: Path) -> None:
    assert isinstance(
        application({"config": config_file(tmp_path), "insecure": "true"}), serve.Application
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give config=PATH"),
        ({"config": "x", "port": "80"}, "port=80"),
        ({"config": "x", "insecure": "perhaps"}, "insecure=perhaps"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_what_it_refuses(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        application(arguments)
