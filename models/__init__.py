"""GLM in PyTorch and the engine that runs it. Knows nothing of Ray, files of rows, jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.llm import LLM

__all__ = ["load"]


def load(model_dir: str, **engine: Any) -> LLM:
    """Loads a checkpoint for one-off use; `engine` holds fields of EngineConfig, such as dtype or device.

    torch is imported here and not with the package, so that a driver which only plans work stays light.
    """
    from models.engine.interface import EngineConfig
    from models.llm import LLM

    return LLM(EngineConfig(model=str(model_dir), **engine))
