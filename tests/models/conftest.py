"""Random tiny GLM checkpoints in the Hugging Face layout, with weights that make bugs visible.

The library's own initialisation (std 0.02, norms 1, biases 0) hides swapped norms and lost biases;
here weights are N(0, 1/fan_in), norm weights 1 + 0.1 N, biases 0.1 N.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as bpe

VOCAB_SIZE = 512
SPECIALS = [
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = {"glm": (transformers.GlmConfig, "Glm"), "glm4": (transformers.Glm4Config, "Glm4")}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa4": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256},
    "mha": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 192,
            "attention_bias": False, "tie_word_embeddings": True},
    "gqa16": {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64, "hidden_size": 128,
              "rope_theta": 5e6, "rms_norm_eps": 1e-5},
}  # fmt: skip

MakeCheckpoint = Callable[..., Path]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 byte tokens without merges, then GLM's specials: any text can be encoded, ids stay below
    263.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        bpe.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return tokenizer


def randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 * 4)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def save_checkpoint(model: transformers.PreTrainedModel, folder: Path, **save: Any) -> Path:
    model.save_pretrained(folder, **save)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 260]}))
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint(family, shape, head) -> directory, one per combination and session.

    `config` overrides fields, `save` goes to save_pretrained.
    """
    made: dict[str, Path] = {}

    def make(
        family: str = "glm4",
        shape: str = "gqa4",
        head: str = "ForCausalLM",
        save: dict[str, Any] | None = None,
        **config: Any,
    ) -> Path:
        key = repr((family, shape, head, save, sorted(config.items(), key=str)))
        if key not in made:
            made[key] = _make(
                tmp_path_factory.mktemp("checkpoint"), family, shape, head, save or {}, config
            )
        return made[key]

    return make


def _make(
    folder: Path, family: str, shape: str, head: str, save: dict[str, Any], config: dict[str, Any]
) -> Path:
    config_class, prefix = FAMILIES[family]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "max_position_embeddings": 1024,
        "partial_rotary_factor": 0.5,
        "pad_token_id": 256,
        "eos_token_id": [256, 260],
    }
    hf_config = config_class(**(fields | SHAPES[shape] | config))
    torch.manual_seed(0)
    model = getattr(transformers, prefix + head)(hf_config)
    randomize(model, seed=len(family) + len(shape))
    return save_checkpoint(model, folder, **save)


def load_oracle(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in transformers, by its own architecture."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def random_ids(seed: int, count: int) -> list[int]:
    """Ordinary byte tokens."""
    return np.random.default_rng(seed).integers(0, 256, count).tolist()
