"""The engine: requests in, completions out. `build_engine` is the one place that chooses torch, vllm or echo."""

from __future__ import annotations

from models.engine.interface import Engine, EngineConfig
from models.engine.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Delta,
    Embed,
    Generate,
    Inspect,
    Media,
    MediaItem,
    Output,
    PromptScores,
    Request,
    SamplingParams,
    Score,
    Tag,
    TopLogprob,
    Work,
)
from models.parallel import TorchGroup

__all__ = [
    "Choose",
    "Classify",
    "Completion",
    "Constraint",
    "Delta",
    "Embed",
    "Engine",
    "EngineConfig",
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
    """Loads the model that `config` names and returns the engine that runs it, as rank 0 of a group if there is one.

    Raises ConfigError for a checkpoint or option that cannot run.
    """
    if config.kind == "echo":
        from models.config_reader import load_config
        from models.engine.echo import EchoEngine
        from models.processing.tokenizer import Tokenizer

        model = load_config(config.model)
        tokenizer = Tokenizer.from_dir(config.model)
        return EchoEngine(
            tokenizer=tokenizer,
            hidden_size=model.hidden_size,
            num_labels=model.num_labels,
            merge_size=model.vision.spatial_merge_size if model.vision else None,
        )
    from models.config_reader import load_config
    from models.engine.settings import resolve_auto
    from models.engine.vllm_limits import check_installed, set_environment

    config = resolve_auto(config, load_config(config.model))
    if config.kind == "vllm":
        check_installed()
        set_environment(config.device)
        from models.engine.vllm_engine import VllmEngine

        return VllmEngine.from_checkpoint(config)
    from models.engine.engine import TorchEngine

    return TorchEngine.from_checkpoint(config, group)
