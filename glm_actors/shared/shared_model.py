"""What a batch job and a live application tell each other about a model that they share.

Owns what makes two of them the same model for a job's results, the message that carries a job's
requests, and what can become of it. Knows nothing of Ray or of how requests are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from glm_batch.models.checkpoint.digest import model_digest
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import EngineError
from glm_batch.models.version import __version__


class NoReplicaError(Exception):
    """No replica has taken the message."""


class ReplicaLostError(Exception):
    """The replica that had taken the message did not live to answer it."""


class AppFailedError(EngineError):
    """The application cannot do the work, whichever process of the job asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What decides the answers, as far as two sides can tell: the checkpoint's files, these
    settings, our version.
    """

    checkpoint: str
    kind: str
    dtype: str
    max_model_len: str
    version: str

    @classmethod
    def of(cls, config: EngineConfig) -> ModelIdentity:
        """Reads samples of the checkpoint's files."""
        kind = "torch" if config.kind == "auto" else config.kind  # as serving has it
        longest = str(config.max_model_len)
        return cls(
            checkpoint=model_digest(config.model),
            kind=kind,
            dtype=config.dtype,
            max_model_len=longest,
            version=__version__,
        )

    def differences(self, other: ModelIdentity) -> list[str]:
        """In which of a job's keys `other`, which is served, is another: for people."""
        if self.version != other.version:
            return [
                f"it runs glm-batch {other.version}, the job {self.version}: use the same version on both sides"
            ]
        if self.checkpoint != other.checkpoint:
            return ["model: its files are others"]
        both = [(name, value, asdict(other)[name]) for name, value in asdict(self).items()]
        return [
            f"engine.{name}: {mine} in the job, {its} there"
            for name, mine, its in both
            if mine != its
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedModel:
    """A model of a live application: the Ray Serve deployment to ask, and what it must be."""

    app: str
    deployment: str
    identity: ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """Requests for a replica, to be answered all at once by their completions, in their order.

    A replica with another identity answers with that one instead. `caller` names the process that
    asks.
    """

    caller: str
    identity: ModelIdentity
    requests: Sequence[Request]


Answer = list[Completion] | ModelIdentity
