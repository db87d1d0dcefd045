"""What is served and within which bounds: one frozen dataclass for each section of the serve
configuration.

Owns names, types and defaults. Reading YAML and judging values against files is the business of
jobs.serving.serve_config.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from glm_batch.models.engine.api.interface import EngineConfig, EngineOptions, Task
from glm_batch.models.request_limits import RequestLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model by name."""

    model: str  # a checkpoint directory
    engine: EngineOptions = field(default_factory=EngineOptions)
    replicas: int | list[int] = 1  # or [least, most] to follow the queue's length
    thinking: bool = False  # unless a request says otherwise

    @property
    def engine_config(self) -> EngineConfig:
        # A request for a vector must not make vLLM load the model once more.
        task: Task | None = "generate" if self.engine.kind == "vllm" else None
        return self.engine.of(self.model, task)

    @property
    def wants_gpu(self) -> bool:
        """Whether it would take a GPU for each rank if there are enough."""
        return self.engine.device != "cpu" and self.engine.kind != "echo"

    @property
    def replica_range(self) -> tuple[int, int]:
        """(least, most) replicas."""
        if isinstance(self.replicas, int):
            return self.replicas, self.replicas
        return self.replicas[0], self.replicas[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """A whole serve configuration. The token comes from an environment variable or a file, never
    from the YAML.
    """

    models: dict[str, ServedModel]  # by the names that requests give
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str | None = None  # the environment variable with the clients' token
    token_file: str | None = None  # or a file that holds it
    limits: RequestLimits = field(default_factory=RequestLimits)
