"""Every bad serve configuration is refused before Ray starts, with its place and its remedy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
from glm_batch.glm_actors.serving.replicas.deployment import build_application
from glm_batch.jobs.serving.serve_config import check_settings, load_settings
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.errors import ConfigError
from tests.glm_actors.serving.conftest import ROOT, TINY, TOKEN

Change = Callable[[dict[str, Any]], object]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(folder: Path, change: Change = lambda config: None) -> str:
    config: dict[str, Any] = {
        "models": {"tiny": {"model": TINY, "engine": {"dtype": "float32"}, "replicas": 1}},
        "host": "127.0.0.1",
        "port": free_port(),
        "token_env": "GLM_TEST_TOKEN",
        "limits": {"max_tokens": 100},
    }
    change(config)
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def model(**changes: Any) -> Change:
    return lambda config: config["models"]["tiny"].update(changes)


def top(**changes: Any) -> Change:
    return lambda config: config.update(changes)


BAD: list[tuple[str, Change, list[str]]] = [
    ("unknown key", top(modles={}), ["serve.yaml:12: modles: unknown key", "did you mean models?"]),
    ("unknown key of a model", model(replica=2), ["models.tiny.replica: unknown key", "replicas"]),
    (
        "unknown key of an engine",
        model(engine={"dtyp": "auto"}),
        ["models.tiny.engine.dtyp", "dtype"],
    ),
    ("unknown limit", top(limits={"max_token": 3}), ["limits.max_token", "max_tokens"]),
    ("no models", lambda config: config.pop("models"), ["models: the key is missing"]),
    ("empty models", top(models={}), ["models: it is empty"]),
    (
        "model without a directory",
        top(models={"tiny": {}}),
        ["models.tiny.model: the key is missing"],
    ),
    ("text for a number", top(port="8000"), ['port: it is "8000"', "a whole number"]),
    ("port", top(port=70000), ["port", "1 to 65535"]),
    (
        "bad dtype",
        model(engine={"dtype": "int8"}),
        ["models.tiny.engine.dtype", '"int8"', '"bfloat16"'],
    ),
    ("device", model(engine={"device": "gpu"}), ["models.tiny.engine.device", "auto, cpu or cuda"]),
    (
        "no tokens",
        model(engine={"kv_cache_tokens": 0}),
        ["models.tiny.engine.kv_cache_tokens: it is 0, but it must be a positive integer"],
    ),
    ("no replicas", model(replicas=0), ["models.tiny.replicas", "from 1 on"]),
    ("turned range", model(replicas=[3, 1]), ["models.tiny.replicas", "[least, most]"]),
    ("three replicas", model(replicas=[1, 2, 3]), ["models.tiny.replicas"]),
    ("vllm", model(engine={"kind": "vllm"}), ["models.tiny.engine.kind", "vLLM", "use torch"]),
    (
        "ranks",
        model(engine={"tensor_parallel_size": 3}),
        ["models.tiny.engine.tensor_parallel_size", "use 1, 2, 4"],
    ),
    (
        "long",
        model(engine={"max_model_len": 1 << 20}),
        ["models.tiny.engine.max_model_len", "at most 2048"],
    ),
    ("no directory", model(model="nowhere"), ["models.tiny.model", "no such directory"]),
    ("no checkpoint", model(model=str(ROOT / "examples")), ["models.tiny.model", "config.json"]),
    (
        "name",
        lambda config: config["models"].update({"a b": config["models"]["tiny"]}),
        ["models.a b: a name has"],
    ),
    (
        "names that Ray cannot tell apart",
        lambda config: config["models"].update(
            {"a/b": config["models"]["tiny"], "a_b": config["models"]["tiny"]}
        ),
        ["models: two names"],
    ),
    ("zero limit", top(limits={"max_queue": 0}), ["limits.max_queue", "above 0"]),
    ("endless", top(limits={"request_s": float("inf")}), ["limits.request_s"]),
    ("no token", lambda config: config.pop("token_env"), ["token_env", "token_file", "--insecure"]),
    ("two tokens", top(token_file="x"), ["token_env", "token_file"]),
    ("no variable", top(token_env="GLM_NO_SUCH"), ["token_env", "GLM_NO_SUCH is not there"]),
    ("short token", top(token_env="GLM_SHORT"), ["token_env", "at least 16"]),
    (
        "no file",
        lambda config: config.update(token_file=config.pop("token_env")),
        ["token_file", "is not there"],
    ),
]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_TEST_TOKEN", TOKEN)
    monkeypatch.setenv("GLM_SHORT", "short")


def refusal(path: str, *, insecure: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        check_settings(*load_settings(path), insecure=insecure)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "needles"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_bad_configuration_is_refused(tmp_path: Path, change: Change, needles: list[str]) -> None:
    text = refusal(write(tmp_path, change))
    for needle in needles:
        assert needle in text
    assert "serve.yaml" in text


def test_a_good_one_is_taken(tmp_path: Path) -> None:
    settings, place = load_settings(write(tmp_path))
    assert check_settings(settings, place, insecure=False) == TOKEN
    assert settings.models["tiny"].replica_range == (1, 1)
    (tmp_path / "token").write_text(TOKEN + "\n")
    in_file = load_settings(
        write(
            tmp_path,
            lambda config: config.update(token_env=None, token_file=str(tmp_path / "token")),
        )
    )
    assert check_settings(*in_file, insecure=False) == TOKEN


def test_insecure_wants_no_token(tmp_path: Path) -> None:
    assert "leave one of them out" in refusal(write(tmp_path), insecure=True)
    open_ = load_settings(write(tmp_path, top(token_env=None)))
    assert check_settings(*open_, insecure=True) is None


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be used" in refusal(write(tmp_path, top(port=port)))


def test_the_command_exits_with_2_and_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    path = write(tmp_path, model(model="nowhere"))
    command = [sys.executable, "-X", "importtime", "-m", "glm_batch.jobs", "serve", path]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "COLUMNS": "80"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    loaded = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert done.returncode == 2
    assert "models.tiny.model: nowhere: no such directory" in done.stderr
    assert not loaded & {"ray", "torch", "fastapi"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own
def test_the_application_says_what_ray_must_know() -> None:
    """Replicas, queue lengths and shares, without a cluster."""
    engine = EngineOptions(kind="echo")
    first, second = (
        ServedModel(model=TINY, engine=engine, replicas=[1, 3]),
        ServedModel(model=TINY, replicas=2),
    )
    settings = ServeSettings(models={"a/b": first, "c": second})
    application = build_application(settings, None, num_cpus=0.5, num_threads=1)
    several, two = (
        bound._bound_deployment for bound in application._bound_deployment.init_args[3:]
    )
    assert (several.name, two.name, two.num_replicas) == ("model-a_b", "model-c", 2)
    scaling = several._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert several.max_ongoing_requests > settings.limits.max_queue
    assert several.ray_actor_options["num_cpus"] == 0.5
