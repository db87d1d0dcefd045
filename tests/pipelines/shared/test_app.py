"""Which applications a job may use: the refusals that need no running one."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from glm_batch.glm_actors.shared.shared_model import ModelIdentity
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.errors import ConfigError
from glm_batch.models.version import __version__
from glm_batch.pipelines.shared.app import shared_model


@pytest.fixture
def engine(echo_checkpoint: Path) -> EngineConfig:
    return EngineConfig(model=str(echo_checkpoint), kind="echo")


def serve(monkeypatch: pytest.MonkeyPatch, **identities: ModelIdentity) -> None:
    monkeypatch.setattr(
        "glm_batch.pipelines.shared.app._deployments", lambda app: sorted(identities)
    )
    monkeypatch.setattr(
        "glm_batch.pipelines.shared.app._identity", lambda app, name: identities[name]
    )


def test_an_application_of_another_version_is_refused_with_both_named(
    engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ModelIdentity.of(engine)
    serve(
        monkeypatch,
        a=replace(mine, version="9.9"),
        b=replace(mine, version="9.9", dtype="bfloat16"),
    )
    with pytest.raises(ConfigError) as caught:
        shared_model("live", engine)
    assert f"--app live: it runs glm-batch 9.9, and this is glm-batch {mine.version}" in str(
        caught.value
    )


def test_the_right_one_of_several_models_is_found(
    engine: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ModelIdentity.of(engine)
    serve(monkeypatch, a=replace(mine, dtype="bfloat16"), b=mine)
    assert shared_model("live", engine).deployment == "b"
    serve(monkeypatch, a=replace(mine, dtype="bfloat16"))
    with pytest.raises(ConfigError, match=r"a: engine\.dtype: auto in the job, bfloat16 there"):
        shared_model("live", engine)


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert project["project"]["version"] == __version__
