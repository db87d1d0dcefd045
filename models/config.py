"""ModelConfig: what a checkpoint directory says about its network, resolved once, with the source of every value.

Reads config.json (and generation_config.json for the end ids) in all the shapes in which GLM checkpoints occur. Knows
nothing of torch, weights or tokenizers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from models.errors import ConfigError

Head = Literal["causal_lm", "sequence_classification", "token_classification"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

ARCHITECTURES: dict[str, tuple[str, Head]] = {
    "GlmForCausalLM": ("glm", "causal_lm"),
    "Glm4ForCausalLM": ("glm4", "causal_lm"),
    "GlmForSequenceClassification": ("glm", "sequence_classification"),
    "Glm4ForSequenceClassification": ("glm4", "sequence_classification"),
    "GlmForTokenClassification": ("glm", "token_classification"),
    "Glm4ForTokenClassification": ("glm4", "token_classification"),
}

# What a missing key means: the defaults of the published configuration classes (glm and glm4 agree on these).
CLASS_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "token_classification_bias": True,
    "problem_type": None,
    "dtype": "float32",
}
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_PARTIAL_ROTARY_FACTOR = 0.5
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `rotary_dim` leading dimensions of each head turn; the rest pass through.

    The fields after `factor` belong to YaRN (arXiv 2309.00071) alone.
    """

    rope_type: Literal["default", "linear", "yarn"]
    rope_theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One text model with its head. `num_labels`, `id2label`, `problem_type` matter to classification heads only."""

    architecture: str
    family: Literal["glm", "glm4"]
    head: Head
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: Literal["float32", "bfloat16", "float16"]
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_labels: int
    id2label: tuple[str, ...]
    problem_type: ProblemType | None
    token_classification_bias: bool

    @property
    def num_parameters(self) -> int:
        """Weights of the whole network, the head included."""
        hidden, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        qkv = (heads + 2 * kv_heads) * self.head_dim
        attention = qkv * hidden + heads * self.head_dim * hidden + (qkv if self.attention_bias else 0)
        norms = (4 if self.family == "glm4" else 2) * hidden
        layer = attention + 3 * hidden * self.intermediate_size + norms
        total = self.num_hidden_layers * layer + self.vocab_size * hidden + hidden
        if self.head == "causal_lm":
            return total + (0 if self.tie_word_embeddings else self.vocab_size * hidden)
        bias = self.head == "token_classification" and self.token_classification_bias
        return total + self.num_labels * hidden + (self.num_labels if bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One value and the file and key that it came from."""

    name: str
    value: object
    source: str


def load_config(model_dir: str | Path) -> ModelConfig:
    """Reads the checkpoint's configuration. Raises ConfigError naming file, key and remedy."""
    return _Resolver(Path(model_dir)).config()


def resolve(model_dir: str | Path) -> list[Resolved]:
    """Every value of `load_config` with its source, for people."""
    resolver = _Resolver(Path(model_dir))
    config = resolver.config()
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "rope"}
    values |= {f"rope.{f.name}": getattr(config.rope, f.name) for f in fields(config.rope)}
    values["num_parameters"] = config.num_parameters
    return [
        Resolved(name=name, value=value, source=resolver.sources.get(name, "computed"))
        for name, value in values.items()
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; ConfigError when it is missing or broken."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; the model must be a checkpoint directory with a {path.name}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


class _Resolver:
    """Looks keys up in the order that the checkpoint formats give them and notes where each was found."""

    def __init__(self, model_dir: Path) -> None:
        self.path = model_dir / "config.json"
        self.raw = read_json(self.path)
        generation = model_dir / "generation_config.json"
        self.generation = read_json(generation) if generation.exists() else {}
        self.sources: dict[str, str] = {}

    def config(self) -> ModelConfig:
        architecture, family, head = self._architecture()
        heads, hidden = self._int("num_attention_heads"), self._int("hidden_size")
        kv_heads, head_dim = self._int("num_key_value_heads"), self._int("head_dim")
        if heads % kv_heads:
            raise ConfigError(
                f"{self.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        if (act := self._get("hidden_act")) != "silu":
            raise ConfigError(f"{self.path}: hidden_act {act!r} is not supported; GLM models use 'silu'")
        max_positions = self._int("max_position_embeddings")
        id2label = self._labels()
        return ModelConfig(
            architecture=architecture,
            family=family,
            head=head,
            vocab_size=self._int("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self._int("intermediate_size"),
            num_hidden_layers=self._int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(self._get("rms_norm_eps")),
            max_position_embeddings=max_positions,
            attention_bias=bool(self._get("attention_bias")),
            tie_word_embeddings=bool(self._get("tie_word_embeddings")),
            rope=self._rope(head_dim, max_positions),
            dtype=self._dtype(),
            pad_token_id=self._get("pad_token_id"),
            eos_token_ids=self._eos(),
            num_labels=len(id2label),
            id2label=id2label,
            problem_type=self._problem_type(),
            token_classification_bias=bool(self._get("token_classification_bias")),
        )

    def _architecture(self) -> tuple[str, Literal["glm", "glm4"], Head]:
        names = self.raw.get("architectures") or []
        model_type = self.raw.get("model_type")
        if not names and model_type in ("glm", "glm4"):
            names, source = ["GlmForCausalLM" if model_type == "glm" else "Glm4ForCausalLM"], "model_type"
        else:
            source = "architectures"
        name = names[0] if names else None
        if name not in ARCHITECTURES:
            raise ConfigError(
                f"{self.path}: architecture {name!r} (model_type {model_type!r}) is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        family, head = ARCHITECTURES[name]
        for key in ("architecture", "family", "head"):
            self.sources[key] = f"{self.path.name}: {source}"
        return name, "glm4" if family == "glm4" else "glm", head

    def _get(self, name: str) -> Any:
        if name in self.raw and (self.raw[name] is not None or CLASS_DEFAULTS.get(name) is None):
            self.sources[name] = f"{self.path.name}: {name}"
            return self.raw[name]
        self.sources[name] = "class default"
        return CLASS_DEFAULTS[name]

    def _int(self, name: str) -> int:
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.path}: {name} is {value!r}; it must be a positive integer")
        return value

    def _dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        key = "dtype" if self.raw.get("dtype") else "torch_dtype"  # v5 and v4 names
        value = str(self.raw.get(key) or CLASS_DEFAULTS["dtype"]).removeprefix("torch.")
        self.sources["dtype"] = f"{self.path.name}: {key}" if self.raw.get(key) else "class default"
        if value not in DTYPES:
            raise ConfigError(f"{self.path}: {key} {value!r} is not supported; one of {', '.join(DTYPES)}")
        return value  # type: ignore[return-value]

    def _eos(self) -> tuple[int, ...]:
        if (ids := self.generation.get("eos_token_id")) is not None:
            self.sources["eos_token_ids"] = "generation_config.json: eos_token_id"
        else:
            ids = self._get("eos_token_id")
            self.sources["eos_token_ids"] = self.sources["eos_token_id"]
        return tuple(ids) if isinstance(ids, list) else (ids,)

    def _labels(self) -> tuple[str, ...]:
        if raw := self.raw.get("id2label"):
            labels = {int(key): str(value) for key, value in raw.items()}
            if sorted(labels) != list(range(len(labels))):
                raise ConfigError(f"{self.path}: id2label must number its labels 0 to {len(labels) - 1} without gaps")
            source = f"{self.path.name}: id2label"
        else:
            count = self.raw.get("num_labels") or 2
            labels = {i: f"LABEL_{i}" for i in range(count)}
            source = f"{self.path.name}: num_labels" if self.raw.get("num_labels") else "class default"
        self.sources["id2label"] = self.sources["num_labels"] = source
        return tuple(labels[i] for i in range(len(labels)))

    def _problem_type(self) -> ProblemType | None:
        value = self._get("problem_type")
        known = ("single_label_classification", "multi_label_classification", "regression")
        if value is not None and value not in known:
            raise ConfigError(f"{self.path}: problem_type {value!r} is not one of {', '.join(known)}")
        return value  # type: ignore[no-any-return]

    def _rope(self, head_dim: int, max_positions: int) -> RopeConfig:
        """The v4 flat, v5 nested and mixed forms; keys inside the rope dictionary win over top-level keys."""
        inner: dict[str, Any] = (self.raw.get("rope_scaling") or {}) | (self.raw.get("rope_parameters") or {})
        inner_name = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"

        def find(name: str, default: Any) -> Any:
            for source, where in ((inner, f"{inner_name}."), (self.raw, "")):
                if source.get(name) is not None:
                    self.sources[f"rope.{name}"] = f"{self.path.name}: {where}{name}"
                    return source[name]
            self.sources[f"rope.{name}"] = "class default"
            return default

        rope_type = find("rope_type", inner.get("type") or "default")
        if rope_type not in ("default", "linear", "yarn"):
            raise ConfigError(
                f"{self.path}: {inner_name}.rope_type {rope_type!r} is not supported; one of default, linear, yarn"
            )
        partial = float(find("partial_rotary_factor", DEFAULT_PARTIAL_ROTARY_FACTOR))
        self.sources["rope.rotary_dim"] = self.sources["rope.partial_rotary_factor"] + " x head_dim"
        theta = float(find("rope_theta", DEFAULT_ROPE_THETA))
        if rope_type == "default":
            return RopeConfig(rope_type="default", rope_theta=theta, rotary_dim=int(head_dim * partial))
        original = int(find("original_max_position_embeddings", max_positions))
        factor = find("factor", max_positions / original if rope_type == "yarn" else None)
        if not isinstance(factor, int | float) or factor < 1:
            raise ConfigError(
                f"{self.path}: {inner_name}.factor is {factor!r}; {rope_type} scaling needs a number >= 1"
            )
        return RopeConfig(
            rope_type=rope_type,
            rope_theta=theta,
            rotary_dim=int(head_dim * partial),
            factor=float(factor),
            original_max_position_embeddings=original,
            attention_factor=inner.get("attention_factor"),
            beta_fast=float(inner.get("beta_fast") or 32.0),
            beta_slow=float(inner.get("beta_slow") or 1.0),
            mscale=inner.get("mscale"),
            mscale_all_dim=inner.get("mscale_all_dim"),
            truncate=bool(inner.get("truncate", True)),
        )
