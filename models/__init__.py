"""GLM in PyTorch and the engine that runs it: no Ray, no files of rows, no jobs.

Rooms, each of which may import those before it: `errors.py`, `checkpoint`, `network.layers`,
`network`, `processing`, `engine` (with rooms of its own). Read network/glm.py, then
engine/torch_engine.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_batch.models.engine.llm import LLM

__all__ = ["load"]


def load(model_dir: str, **engine: Any) -> LLM:
    """Loads a checkpoint for one-off use; `engine` holds EngineOptions, such as dtype or device.

    Raises ConfigError for a checkpoint or an option that cannot run. torch is imported here and not
    with the package, so that a driver which only plans work stays light.
    """
    from glm_batch.models.engine.api.interface import EngineConfig
    from glm_batch.models.engine.llm import LLM
    from glm_batch.models.errors import ConfigError

    try:
        config = EngineConfig(model=str(model_dir), **engine)
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("engine.")) from error
    return LLM(config)
