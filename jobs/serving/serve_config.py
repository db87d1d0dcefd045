"""A serve configuration: YAML to ServeSettings, and whether it can be served.

Owns every refusal that comes before Ray starts, with the key's place and the remedy. Loads
tokenizers, no weights.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from glm_batch.glm_actors.media.media_source import endpoints
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
from glm_batch.glm_actors.serving.replicas.deployment import deployment_name
from glm_batch.jobs.checks.engine_checks import checkpoint_problems, engine_problems
from glm_batch.jobs.files.sections import Place, Problem, load_sections
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.headers import check_weights
from glm_batch.models.errors import ConfigError
from glm_batch.models.request_limits import RequestLimits

WHAT = "a serve configuration is a mapping of keys (models, host, port, token_env, limits ...)"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
MIN_TOKEN_CHARS = 16


def load_settings(path: str) -> tuple[ServeSettings, Place]:
    """Raises ConfigError that names each key and its place."""
    return load_sections(ServeSettings, path, WHAT)


def check_settings(
    settings: ServeSettings, place: Place, *, insecure: bool, listens: bool = True
) -> str | None:
    """The token, None with `insecure`. Raises ConfigError with all problems of keys, or else all of
    checkpoints.

    `listens`: whether this process opens the port.
    """
    token, token_problems = _token(settings, insecure=insecure)
    place.refuse([*_key_problems(settings), *token_problems])
    limits = settings.limits
    place.refuse(
        [
            each
            for name, model in settings.models.items()
            for each in _model_problems(name, model, limits)
        ]
    )
    place.refuse(list(_port_problems(settings)) if listens else [])
    return token


def _key_problems(settings: ServeSettings) -> Iterator[Problem]:
    if not settings.models:
        yield Problem(key="models", message="it is empty; name at least one model")
    if not 1 <= settings.port <= 65535:
        yield Problem(key="port", message=f"it is {settings.port}, but it must be 1 to 65535")
    for field in dataclasses.fields(RequestLimits):
        value = getattr(settings.limits, field.name)
        if isinstance(value, int | float) and value is not False and not 0 < value < float("inf"):
            yield Problem(
                key=f"limits.{field.name}", message=f"it is {value}, but it must be above 0"
            )
    for key in ("media_hosts", "media_private_hosts"):
        try:
            endpoints(getattr(settings.limits, key))
        except ConfigError as error:
            yield Problem(key=f"limits.{key}", message=str(error).partition(": ")[2])
    if len({deployment_name(name) for name in settings.models}) < len(settings.models):
        yield Problem(
            key="models", message="two names differ in / and _ alone; Ray cannot tell them apart"
        )
    for name, model in settings.models.items():
        yield from _served_problems(f"models.{name}", name, model)


def _served_problems(key: str, name: str, model: ServedModel) -> Iterator[Problem]:
    if not re.fullmatch(MODEL_NAME, name):
        yield Problem(
            key=key,
            message="a name has letters, digits and . _ / - and begins with a letter or digit",
        )
    counts = [model.replicas] if isinstance(model.replicas, int) else model.replicas
    least, most = (counts[0], counts[-1]) if counts else (0, 0)
    if len(counts) not in (1, 2) or not 1 <= least <= most:
        message = f"it is {model.replicas}; give a number from 1 on, or [least, most]"
        yield Problem(key=f"{key}.replicas", message=message)
    yield from engine_problems(model.engine, f"{key}.engine")


def _token(settings: ServeSettings, *, insecure: bool) -> tuple[str | None, list[Problem]]:
    given = [key for key in ("token_env", "token_file") if getattr(settings, key) is not None]
    if insecure:
        contradiction = "with --insecure nobody is asked for it; leave one of them out"
        return None, [Problem(key=key, message=contradiction) for key in given]
    if len(given) != 1:
        message = (
            "name the environment variable with the clients' token, or a file in token_file (or "
            "use --insecure)"
        )
        return None, [Problem(key="token_env", message=message)]
    if settings.token_env is not None:
        token, where = (
            os.environ.get(settings.token_env),
            f"the environment variable {settings.token_env}",
        )
    else:
        token, where = _read_token(settings.token_file or ""), f"the file {settings.token_file}"
    if token is None:
        return None, [Problem(key=given[0], message=f"{where} is not there; set it")]
    if (
        len(token) < MIN_TOKEN_CHARS
        or not token.isascii()
        or any(character.isspace() for character in token)
    ):
        message = f"{where} must hold at least {MIN_TOKEN_CHARS} ASCII characters without blanks"
        return None, [Problem(key=given[0], message=message)]
    return token, []


def _read_token(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _model_problems(name: str, model: ServedModel, caps: RequestLimits) -> Iterator[Problem]:
    key, path = f"models.{name}.model", Path(model.model)
    if not path.is_dir():
        yield Problem(
            key=key,
            message=f"{path}: no such directory; name a checkpoint in the Hugging Face layout",
        )
        return
    try:
        config = load_config(path)
        RequestPrompter(model.model, caps).close()
    except ConfigError as error:
        yield Problem(key=key, message=str(error))
        return
    yield from checkpoint_problems(model.engine, config, None, f"models.{name}.engine")
    if model.engine.kind != "echo":
        try:
            check_weights(path, quantised=model.engine.kind == "vllm")
        except ConfigError as error:
            yield Problem(key=key, message=str(error))


def _port_problems(settings: ServeSettings) -> Iterator[Problem]:
    """Ray would start the server elsewhere than here, and tell of a used port late."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        yield Problem(
            key="port",
            message=f"{settings.host}:{settings.port} cannot be used: {reason}; choose another",
        )
