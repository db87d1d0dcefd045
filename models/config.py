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
NULLABLE = ("pad_token_id", "problem_type")  # an explicit null is a value; elsewhere it is a missing key
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
    def longest_context(self) -> int:
        """The most tokens, prompt and answer together, that it was made for, or was stretched to by its rope."""
        return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))

    @property
    def inferred_problem_type(self) -> ProblemType:
        """As config.json says; else by the number of labels, as training would have inferred it."""
        if self.problem_type is not None:
            return self.problem_type
        return "regression" if self.num_labels == 1 else "single_label_classification"

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
            rms_norm_eps=self._positive("rms_norm_eps", self._get("rms_norm_eps")),
            max_position_embeddings=max_positions,
            attention_bias=self._bool("attention_bias"),
            tie_word_embeddings=self._bool("tie_word_embeddings"),
            rope=self._rope(head_dim, max_positions),
            dtype=self._dtype(),
            pad_token_id=self._get("pad_token_id"),
            eos_token_ids=self._eos(),
            num_labels=len(id2label),
            id2label=id2label,
            problem_type=self._problem_type(),
            token_classification_bias=self._bool("token_classification_bias"),
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
        if name in self.raw and (self.raw[name] is not None or name in NULLABLE):
            self.sources[name] = f"{self.path.name}: {name}"
            return self.raw[name]
        self.sources[name] = "class default"
        return CLASS_DEFAULTS[name]

    def _int(self, name: str) -> int:
        return self._positive_int(name, self._get(name))

    def _positive_int(self, where: str, value: Any) -> int:
        if not _is_int(value) or value < 1:
            raise ConfigError(f"{self.path}: {where} is {value!r}; it must be a positive integer")
        return int(value)

    def _positive(self, where: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.path}: {where} is {value!r}; it must be a positive number")
        return float(value)

    def _bool(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {name} is {value!r}; it must be true or false")
        return value

    def _dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        key = "dtype" if self.raw.get("dtype") else "torch_dtype"  # v5 and v4 names
        value = str(self.raw.get(key) or CLASS_DEFAULTS["dtype"]).removeprefix("torch.")
        self.sources["dtype"] = f"{self.path.name}: {key}" if self.raw.get(key) else "class default"
        if value not in DTYPES:
            raise ConfigError(f"{self.path}: {key} {value!r} is not supported; one of {', '.join(DTYPES)}")
        return value  # type: ignore[return-value]

    def _eos(self) -> tuple[int, ...]:
        path = self.path
        if (value := self.generation.get("eos_token_id")) is not None:
            path = path.with_name("generation_config.json")
            self.sources["eos_token_ids"] = f"{path.name}: eos_token_id"
        else:
            value = self._get("eos_token_id")
            self.sources["eos_token_ids"] = self.sources["eos_token_id"]
        ids = value if isinstance(value, list) else [value]
        if not all(map(_is_int, ids)):
            raise ConfigError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
        return tuple(ids)

    def _labels(self) -> tuple[str, ...]:
        if raw := self.raw.get("id2label"):
            numbers = [str(i) for i in range(len(raw))]
            if not isinstance(raw, dict) or sorted(raw) != sorted(numbers):
                raise ConfigError(f"{self.path}: id2label must number its labels 0 to {len(raw) - 1} without gaps")
            labels = [str(raw[number]) for number in numbers]
            source = f"{self.path.name}: id2label"
        else:
            count = self._positive_int("num_labels", self.raw.get("num_labels") or 2)
            labels = [f"LABEL_{i}" for i in range(count)]
            source = f"{self.path.name}: num_labels" if self.raw.get("num_labels") else "class default"
        self.sources["id2label"] = self.sources["num_labels"] = source
        return tuple(labels)

    def _problem_type(self) -> ProblemType | None:
        value = self._get("problem_type")
        known = ("single_label_classification", "multi_label_classification", "regression")
        if value is not None and value not in known:
            raise ConfigError(f"{self.path}: problem_type {value!r} is not one of {', '.join(known)}")
        return value  # type: ignore[no-any-return]

    def _rope(self, head_dim: int, max_positions: int) -> RopeConfig:
        """The v4 flat, v5 nested and mixed forms; keys inside a rope dictionary win over top-level keys."""
        rope_type = self._rope_get("rope_type", "default")
        if rope_type not in ("default", "linear", "yarn"):
            where = self._rope_where("rope_type")
            raise ConfigError(f"{self.path}: {where} {rope_type!r} is not supported; one of default, linear, yarn")
        theta = self._rope_positive("rope_theta", DEFAULT_ROPE_THETA)
        rotary_dim = self._rotary_dim(head_dim)
        if rope_type == "default":
            return RopeConfig(rope_type="default", rope_theta=theta, rotary_dim=rotary_dim)
        name = "original_max_position_embeddings"
        original = self._rope_get(name, max_positions, default_source=self.sources["max_position_embeddings"])
        original = self._positive_int(self._rope_where(name), original)
        factor = self._rope_get("factor", max_positions / original if rope_type == "yarn" else None)
        if not isinstance(factor, int | float) or factor < 1:
            where = self._rope_where("factor")
            raise ConfigError(f"{self.path}: {where} is {factor!r}; {rope_type} scaling needs a number >= 1")
        attention_factor, mscale, mscale_all_dim = (
            None if self._rope_get(name, None) is None else self._rope_positive(name, None)
            for name in ("attention_factor", "mscale", "mscale_all_dim")
        )
        return RopeConfig(
            rope_type=rope_type,
            rope_theta=theta,
            rotary_dim=rotary_dim,
            factor=float(factor),
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            beta_fast=self._rope_positive("beta_fast", 32.0),
            beta_slow=self._rope_positive("beta_slow", 1.0),
            mscale=mscale,
            mscale_all_dim=mscale_all_dim,
            truncate=bool(self._rope_get("truncate", True)),
        )

    def _rotary_dim(self, head_dim: int) -> int:
        share = self._rope_get("partial_rotary_factor", DEFAULT_PARTIAL_ROTARY_FACTOR)
        where = self._rope_where("partial_rotary_factor")
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"{self.path}: {where} is {share!r}; it must be a number above 0 and at most 1")
        rotary_dim = int(head_dim * share)
        if not rotary_dim or rotary_dim % 2:
            raise ConfigError(
                f"{self.path}: {where} {share} of head_dim {head_dim} is {rotary_dim}; it must be an even number of "
                "dimensions, for they turn in pairs"
            )
        self.sources["rope.rotary_dim"] = self.sources["rope.partial_rotary_factor"] + " x head_dim"
        return rotary_dim

    def _rope_positive(self, name: str, default: float | None) -> float:
        value = self._rope_get(name, default)
        return self._positive(self._rope_where(name), value)

    def _rope_get(self, name: str, default: Any, *, default_source: str = "class default") -> Any:
        """Advice to scale a model is to add a rope_scaling, so that it wins over a rope_parameters beside it."""
        for section in ("rope_scaling", "rope_parameters", ""):
            keys = self.raw.get(section) or {} if section else self.raw
            if not isinstance(keys, dict):
                raise ConfigError(f"{self.path}: {section} is {keys!r}; it must be an object")
            for key in (name, "type") if section and name == "rope_type" else (name,):
                if keys.get(key) is not None:
                    self.sources[f"rope.{name}"] = f"{self.path.name}: {section}{section and '.'}{key}"
                    return keys[key]
        self.sources[f"rope.{name}"] = default_source
        return default

    def _rope_where(self, name: str) -> str:
        """The key that a value came from or would belong to."""
        found = self.sources[f"rope.{name}"].removeprefix(f"{self.path.name}: ")
        if found.endswith(("." + name, ".type")) or found == name:
            return found
        return f"{'rope_scaling' if self.raw.get('rope_scaling') else 'rope_parameters'}.{name}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
