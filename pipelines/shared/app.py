"""Finds the live application whose replicas shall run a job, and which of its models is the job's.

Owns every refusal of `--app`. Imports ray inside functions only.
"""

from __future__ import annotations

from typing import Any

from glm_batch.glm_actors.serving.replicas.deployment import MODEL_PREFIX
from glm_batch.glm_actors.shared.shared_model import MESSAGES, ModelIdentity, SharedModel
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.errors import ConfigError

IDENTITY_S = 60.0


def shared_model(app: str, engine: EngineConfig, *, senders: int = 1) -> SharedModel:
    """The model of the running application that gives the answers which `engine` would give. Raises
    ConfigError.

    As many messages may be under way as `senders` of them would have.
    """
    wanted = ModelIdentity.of(engine)
    served = {name: _identity(app, name) for name in _deployments(app)}
    for name, identity in served.items():
        if identity == wanted:
            messages = senders * MESSAGES
            return SharedModel(app=app, deployment=name, identity=wanted, messages=messages)
    versions = {identity.version for identity in served.values()} - {wanted.version}
    if versions:
        theirs = " and ".join(sorted(versions))
        raise ConfigError(
            f"--app {app}: it runs glm-batch {theirs}, and this is glm-batch {wanted.version}, "
            "whose answers may be others; use the same version on both sides"
        )
    found = "; ".join(
        f"{name.removeprefix(MODEL_PREFIX)}: {', '.join(wanted.differences(identity))}"
        for name, identity in served.items()
    )
    raise ConfigError(
        f"--app {app}: it does not serve the job's model {engine.model} as the job asks for it "
        f"({found}); change the job's keys, or serve this model"
    )


def _deployments(app: str) -> list[str]:
    """Those of models."""
    from ray import serve

    applications = serve.status().applications
    if app not in applications:
        running = ", ".join(sorted(applications)) or "none"
        raise ConfigError(
            f"--app {app}: no such application runs on this Ray cluster (running: {running}); "
            "start it with glm-batch serve, or set RAY_ADDRESS to its cluster"
        )
    return sorted(name for name in applications[app].deployments if name.startswith(MODEL_PREFIX))


def _identity(app: str, deployment: str) -> ModelIdentity:
    """Waits for a replica that is only just starting."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        handle: Any = serve.get_deployment_handle(deployment, app)
        found: ModelIdentity = handle.identity.remote().result(timeout_s=IDENTITY_S)
    except (RayError, RayServeException, TimeoutError) as error:
        told = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"--app {app}: its {deployment} does not answer ({told}); wait until it is up"
        ) from error
    return found
