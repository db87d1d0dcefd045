"""From a checkpoint directory to a loaded network: the table of families, and build_model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.checkpoint.weights import load_weights
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.glm import Backbone, Glm4Backbone, Glm4vBackbone
from glm_batch.models.network.heads import CausalLMHead, ClassificationHead, ShardedLMHead
from glm_batch.models.network.layers.attention import Attend, attend_grouped
from glm_batch.models.network.layers.linear import can_pack, pack_linears
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup, check_parts
from glm_batch.models.network.vision import VisionTower

BACKBONES: dict[str, type[Backbone]] = {
    "glm": Backbone,
    "glm4": Glm4Backbone,
    "glm4v": Glm4vBackbone,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded network, or one rank's part of it; `vision` is None where it reads nothing but text.

    num_heads, num_kv_heads: those that are here.
    """

    config: ModelConfig
    backbone: Backbone
    vision: VisionTower | None
    head: CausalLMHead | ClassificationHead
    dtype: torch.dtype
    device: torch.device
    num_heads: int
    num_kv_heads: int


def build_model(
    model_dir: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attend: Attend = attend_grouped,
    group: ParallelGroup = SINGLE,
) -> Model:
    """Loads a checkpoint, or a rank's part. Raises ConfigError for what cannot or must not be."""
    config = load_config(model_dir)
    check_parts(config, group.size)
    if config.family != "glm" and dtype == torch.float16:
        raise ConfigError(
            f"{model_dir}: {config.family} in float16 is refused: its residual stream outgrows "
            "float16's largest number (65504), and the norms after each sublayer turn that into "
            "NaN; use bfloat16 or float32"
        )
    backbone = BACKBONES[config.family](
        config, dtype=dtype, device=device, attend=attend, group=group
    )
    head: CausalLMHead | ClassificationHead
    if config.head == "causal_lm":
        causal = CausalLMHead if group.size == 1 else ShardedLMHead
        head = causal(config, backbone, dtype=dtype, device=device, group=group)
    else:
        head = ClassificationHead(config, dtype=dtype, device=device)
    vision = VisionTower(config.vision, dtype=dtype, device=device) if config.vision else None
    # No name for the targets: they would keep every weight alive while it is packed.
    load_weights(
        model_dir,
        backbone.targets() | head.targets() | (vision.targets() if vision else {}),
        copies=head.copies(),
    )
    if vision:
        vision.patch_embed.fold(
            ImageProcessorConfig.from_dir(model_dir).normalization,
            VideoProcessorConfig.from_dir(model_dir).normalization,
        )
    if can_pack(dtype, device):
        for module in filter(None, (backbone, head, vision)):
            pack_linears(module)
    return Model(
        config=config,
        backbone=backbone,
        head=head,
        vision=vision,
        dtype=dtype,
        device=device,
        num_heads=group.part(config.num_attention_heads).size,
        num_kv_heads=group.kv_part(config.num_key_value_heads).size,
    )
