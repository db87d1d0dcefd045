"""Makes a glm4 checkpoint of the 9B shape with random bf16 weights, drawn on the GPU, in one file
for each layer.

Owns the shape and the files. The tokenizer is the shipped tiny one: prompts are ids, and most of
the vocabulary is never written. Does not know what the benchmarks ask of it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = Path(__file__).parents[1] / "examples" / "tiny_glm"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Named as in config.json; the defaults are those of the 9B models."""

    hidden_size: int = 4096
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 13696
    vocab_size: int = 151552


def make_large_model(directory: Path, shape: Shape, device: str) -> Path:
    """Writes the checkpoint into `directory`, or leaves one of the same shape that is there and
    whole.
    """
    stamp = directory / "made_by.json"
    if stamp.exists() and json.loads(stamp.read_text()) == asdict(shape):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, directory)
    (directory / "config.json").write_text(json.dumps(_settings(shape), indent=2))
    weight_map: dict[str, str] = {}
    for i, weights in enumerate(_pieces(shape, device)):
        file = f"model-{i:05d}.safetensors"
        save_file(
            {name: tensor.cpu() for name, tensor in weights.items()},
            directory / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(weights, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    stamp.write_text(json.dumps(asdict(shape)))
    return directory


def _settings(shape: Shape) -> dict[str, object]:
    end_ids = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    return asdict(shape) | {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "dtype": "bfloat16",
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": False,
        "pad_token_id": end_ids[0] if isinstance(end_ids, list) else end_ids,
        "eos_token_id": end_ids,
    }


def _pieces(shape: Shape, device: str) -> Iterator[Weights]:
    """Weights N(0, 1/fan_in), norm weights 1 + 0.1 N: activations keep their size through the
    layers.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv, inner = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (normal(rows, columns) / math.sqrt(columns)).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * normal(hidden)).to(torch.bfloat16)

    yield {"model.embed_tokens.weight": normal(shape.vocab_size, hidden).to(torch.bfloat16)}
    yield {"lm_head.weight": matrix(shape.vocab_size, hidden), "model.norm.weight": norm()}
    for layer in range(shape.num_hidden_layers):
        yield {
            f"model.layers.{layer}.{name}": weight
            for name, weight in {
                "self_attn.q_proj.weight": matrix(heads, hidden),
                "self_attn.k_proj.weight": matrix(kv, hidden),
                "self_attn.v_proj.weight": matrix(kv, hidden),
                "self_attn.o_proj.weight": matrix(hidden, heads),
                "mlp.gate_up_proj.weight": matrix(2 * inner, hidden),
                "mlp.down_proj.weight": matrix(hidden, inner),
                "input_layernorm.weight": norm(),
                "post_attention_layernorm.weight": norm(),
                "post_self_attn_layernorm.weight": norm(),
                "post_mlp_layernorm.weight": norm(),
            }.items()
        }
