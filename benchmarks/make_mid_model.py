"""Makes the "mid" glm4 checkpoint of the comparisons: 243 M parameters, random bf16 weights, its
own tokenizer.

Owns the model's shape, the synthetic text its tokenizer is trained on, and the files of the
checkpoint directory. Does not know what the benchmarks ask of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 1024, 16, 16, 2, 64, 2816, 32768
LABELS = ("billing", "shipping", "account", "technical")
SPECIALS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
    "<|end_of_video|>",
)  # fmt: skip
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
# Letters, numbers of up to three digits, punctuation runs and white space are separate pieces, as
# in GLM-4.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """[gMASK]<sop>
{%- for message in messages if message.role == 'system' -%}
<|system|>{{ '\\n' }}{{ message.content }}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
<|{{ message.role }}|>{{ '\\n' }}{{ message.content }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
STAMP = "made_by.json"


def make_words(count: int, seed: int = 0) -> list[str]:
    """`count` distinct pronounceable words, the same ones on every machine."""
    rng = random.Random(seed)
    words: dict[str, None] = dict.fromkeys(LABELS)
    while len(words) < count:
        syllables = rng.randint(1, 4)
        word = "".join(
            rng.choice("bcdfghjklmnprstvwz")
            + rng.choice("aeiou")
            + rng.choice(("", "", "n", "r", "s", "l"))
            for _ in range(syllables)
        )
        words[word] = None
    return list(words)


def make_mid_model(directory: Path) -> Path:
    """Writes the checkpoint into `directory`, or leaves one that this very script has already
    written there.
    """
    stamp = {"script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    stamp_path = directory / STAMP
    if stamp_path.exists() and json.loads(stamp_path.read_text()) == stamp:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    stamp_path.unlink(missing_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_settings(directory, tokenizer)
    save_file(random_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    stamp_path.write_text(json.dumps(stamp))
    return directory


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE with fewer than VOCAB ids, the GLM control tokens being the last of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_lines(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIALS]
    )
    assert tokenizer.get_vocab_size() <= VOCAB
    return tokenizer


def _training_lines() -> Iterator[str]:
    rng = random.Random(1)
    words = make_words(40_000)
    weights = [1.0 / (10 + rank) for rank in range(len(words))]
    for label in LABELS:
        yield from (f"{label} {word}" for word in words[:50])
    for _ in range(30_000):
        yield " ".join(rng.choices(words, weights, k=20))


def _write_settings(directory: Path, tokenizer: Tokenizer) -> None:
    ids = {text: tokenizer.token_to_id(text) for text in SPECIALS}
    stop_ids = [ids[text] for text in STOPS]
    config = {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCAB,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": False,
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": stop_ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIALS),
    }
    generation_config = {
        "eos_token_id": stop_ids,
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights N(0, 1/fan_in), norm weights 1 + 0.1 N, biases 0.1 N: activations keep their size
    through the layers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (normal(rows, columns) / math.sqrt(columns)).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * normal(HIDDEN)).to(torch.bfloat16)

    weights = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN).to(torch.bfloat16),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(heads * HEAD_DIM, HIDDEN)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = (0.1 * normal(heads * HEAD_DIM)).to(
                torch.bfloat16
            )
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        weights[f"{prefix}mlp.gate_up_proj.weight"] = matrix(2 * INTERMEDIATE, HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ):
            weights[f"{prefix}{name}.weight"] = norm()
    return weights


def main(directory: Annotated[Path, typer.Argument(help="where the checkpoint goes")]) -> None:
    """Makes the 243 M checkpoint that the comparisons run on."""
    make_mid_model(directory)
    print(f"the mid checkpoint lies in {directory}")


if __name__ == "__main__":
    typer.run(main)
