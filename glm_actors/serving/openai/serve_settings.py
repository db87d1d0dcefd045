"""What is served and within which bounds: one frozen dataclass for each section of the serve
configuration.

Owns names, types and defaults. Reading YAML and judging values against files is the business of
jobs.serving.serve_config.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.request_limits import RequestLimits

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeEngine:
    """The `engine:` section of a model; all of it goes to EngineConfig."""

    # auto: torch, which answers every kind of request
    kind: Literal["auto", "torch", "vllm", "echo"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # float16: glm alone
    device: str = "auto"  # auto, cpu or cuda
    tensor_parallel_size: int = 1  # ranks that hold one model together, each on a GPU of its own
    max_step_tokens: int | Auto = "auto"  # tokens of one forward pass
    batch_step_tokens: int | Auto = "auto"  # of one with rows of a batch job in it
    max_num_seqs: int | Auto = "auto"  # sequences in flight
    max_model_len: int | Auto = "auto"  # prompt and answer together, in tokens
    kv_cache_tokens: int | Auto = "auto"  # tokens that the cache of keys and values holds


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model by name."""

    model: str  # a checkpoint directory
    engine: ServeEngine = field(default_factory=ServeEngine)
    replicas: int | list[int] = 1  # or [least, most] to follow the queue's length
    thinking: bool = False  # unless a request says otherwise

    @property
    def engine_config(self) -> EngineConfig:
        chosen = asdict(self.engine)
        if self.engine.kind == "auto":
            chosen["kind"] = "torch"  # the one that answers every kind of request
        # A request for a vector must not make vLLM load the model once more.
        return EngineConfig(
            model=self.model, task="generate" if self.engine.kind == "vllm" else None, **chosen
        )

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
