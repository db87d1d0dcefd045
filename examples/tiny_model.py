"""The tiny checkpoint's model: its size, its forward pass over batches with text, pictures and
clips, and its files.

Knows nothing of tickets, shapes or training.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from samples import IGNORED, IMAGES, VIDEOS, Batch, media_tokens
from tiny_tokenizer import STOP_TOKENS, ChatEncoder, save_tokenizer
from torch import nn
from transformers import GenerationConfig, Glm4vConfig, Glm4vForConditionalGeneration

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig

MAX_POSITIONS = 2048
HEAD_DIM = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Width and number of layers of the text model and of the vision tower."""

    width: int = 128
    layers: int = 4
    vision_width: int = 128
    vision_layers: int = 4


def build_model(encoder: ChatEncoder, size: Size) -> Glm4vForConditionalGeneration:
    """A glm4v of about two million parameters. Sandwich norms give each sublayer of the text model
    an output of size 1, so the embeddings start near that size too, and the head starts as their
    small copy, which makes copying easy to learn."""
    num_tokens = encoder.tokenizer.get_vocab_size()
    stops = [encoder.control_ids[token] for token in STOP_TOKENS]
    config = Glm4vConfig(
        text_config={
            "vocab_size": 64 * math.ceil(num_tokens / 64),
            "hidden_size": size.width,
            "intermediate_size": 3 * size.width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.width // HEAD_DIM,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
            "pad_token_id": encoder.control_ids["<|endoftext|>"],
            "eos_token_id": stops,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "num_heads": size.vision_width // HEAD_DIM,
            "image_size": 168,
            "out_hidden_size": size.width,
            "intermediate_size": 3 * size.width,
        },
        **{
            f"{name}_token_id": getattr(media_tokens(encoder), name)
            for name in media_tokens(encoder).__slots__
        },
    )
    model = Glm4vForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        embeddings = model.model.language_model.embed_tokens.weight
        nn.init.normal_(embeddings, std=0.5)
        model.lm_head.weight.copy_(0.1 * embeddings)
        _look_around(model.model.visual)
    return model


def _look_around(tower: nn.Module) -> None:
    """Let each head of the vision tower begin by looking at one of the patches around, as a
    convolution does.

    All position embeddings share a vector, from which queries and keys get parts that the rotary
    embedding turns into a peak at the wanted offset. Without it the tower takes thousands of steps
    to find out what lies beside what.
    """
    positions = tower.embeddings.position_embedding.weight
    shared = torch.randn(positions.shape[1])
    positions.copy_(shared + 0.1 * torch.randn(positions.shape))
    for number, block in enumerate(tower.blocks):
        reach, diagonal = 1 + number // 2, number % 2
        ring = (
            ((0, 1), (1, 0), (0, -1), (-1, 0))
            if not diagonal
            else ((1, 1), (1, -1), (-1, 1), (-1, -1))
        )
        # the residual stream grows block by block
        share = (2 + 2 * number) ** 0.5 * shared / shared.square().sum()
        queries, keys, _ = block.attn.qkv.weight.view(3, block.attn.num_heads, HEAD_DIM, -1)
        for head in range(block.attn.num_heads):
            y, x = (reach * step for step in ring[head % len(ring)])
            query, key = _rotary_peak(y, x)
            queries[head].mul_(0.3).add_(query[:, None] * share)
            keys[head].mul_(0.3).add_(key[:, None] * share)


def _rotary_peak(y: int, x: int, height: float = 4.7) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key, [HEAD_DIM], whose product after the rotary embedding peaks where the key's
    patch lies y rows and x columns further. They use the two fastest frequencies of each axis."""
    quarter = HEAD_DIM // 4
    angles = torch.zeros(2 * quarter)
    for start, distance in ((0, y), (quarter, x)):
        angles[start : start + 2] = distance * 10_000.0 ** -(torch.arange(2) / quarter)
    used = (torch.arange(2 * quarter) % quarter < 2) * height
    return torch.cat([used * angles.cos(), used * angles.sin()]), torch.cat(
        [used, torch.zeros(2 * quarter)]
    )


def forward(
    model: Glm4vForConditionalGeneration, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits at the positions that have a target, [targets, vocabulary], in row order; and the
    media's features.
    """
    text = model.model.language_model
    embeddings, features = text.embed_tokens(batch.ids), None
    if len(batch.grids):
        features = model.model.visual(batch.pixels, grid_thw=batch.grids).pooler_output
        embeddings[batch.ids == model.config.image_token_id] = features[batch.features]
    hidden = text(
        inputs_embeds=embeddings, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[batch.targets != IGNORED]).float(), features


def save_checkpoint(
    model: Glm4vForConditionalGeneration, encoder: ChatEncoder, folder: Path
) -> None:
    """Write the whole Hugging Face folder, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    stops = [encoder.control_ids[token] for token in STOP_TOKENS]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=encoder.control_ids["<|endoftext|>"]
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(encoder.tokenizer, folder, MAX_POSITIONS)
    for file, kind, config in (("", "image", IMAGES), ("video_", "video", VIDEOS)):
        settings = {
            f"{kind}_processor_type": f"Glm4v{kind.capitalize()}Processor",
            **_settings(config),
        }
        (folder / f"{file}preprocessor_config.json").write_text(
            json.dumps(settings, indent=2) + "\n"
        )


def _settings(config: ImageProcessorConfig) -> dict[str, object]:
    """What preprocessor_config.json holds; the edges of `size` are numbers of pixels."""
    own = {"fps": VIDEOS.fps, "max_duration": VIDEOS.max_duration_s} if config is VIDEOS else {}
    return {
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "rescale_factor": config.rescale_factor,
        **own,
    }
