"""The engine: requests in, completions out. `build_engine` chooses torch, vllm or echo.

Read torch_engine.py first: it is the loop around a scheduler and a runner; what it is made of lies
in `api` (the vocabulary), `scheduling`, `decoding` and `execution`; `vllm` and `cuda` can be taken
away and are reached through `models.rooms`. llm.py is the few-line Python door.
"""

from __future__ import annotations

from glm_batch.models import rooms
from glm_batch.models.engine.api.interface import Engine, EngineConfig, EngineOptions
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Delta,
    Embed,
    Generate,
    Inspect,
    Output,
    PromptScores,
    Request,
    SamplingParams,
    Score,
    Tag,
    TopLogprob,
    Work,
)
from glm_batch.models.network.layers.parallel import TorchGroup
from glm_batch.models.processing.patches import Media, MediaItem

__all__ = [
    "Choose",
    "Classify",
    "Completion",
    "Constraint",
    "Delta",
    "Embed",
    "Engine",
    "EngineConfig",
    "EngineOptions",
    "Generate",
    "Inspect",
    "Media",
    "MediaItem",
    "Output",
    "PromptScores",
    "Request",
    "SamplingParams",
    "Score",
    "Tag",
    "TopLogprob",
    "Work",
    "build_engine",
]


def build_engine(config: EngineConfig, group: TorchGroup | None = None) -> Engine:
    """Loads the model that `config` names and returns the engine that runs it, as rank 0 of a group
    if there is one.

    Raises ConfigError for a checkpoint or option that cannot run.
    """
    if config.kind == "echo":
        from glm_batch.models.checkpoint.config_reader import load_config
        from glm_batch.models.engine.echo import EchoEngine
        from glm_batch.models.processing.tokenizer import Tokenizer

        model = load_config(config.model)
        tokenizer = Tokenizer.from_dir(config.model)
        return EchoEngine(
            tokenizer=tokenizer,
            hidden_size=model.hidden_size,
            num_labels=model.num_labels,
            merge_size=model.vision.spatial_merge_size if model.vision else None,
        )
    from glm_batch.models.checkpoint.config_reader import load_config
    from glm_batch.models.engine.execution.settings import resolve_auto

    config = resolve_auto(config, load_config(config.model))
    if config.kind == "vllm":
        limits = rooms.load("models.engine.vllm.vllm_limits")
        limits.check_installed()
        limits.set_environment(config.device)
        engine: Engine = rooms.load("models.engine.vllm.vllm_engine").VllmEngine.from_checkpoint(
            config
        )
        return engine
    from glm_batch.models.engine.torch_engine import TorchEngine

    return TorchEngine.from_checkpoint(config, group)
