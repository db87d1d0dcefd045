"""From a checkpoint's files to a ModelConfig, resolved once, with the source of every value.

Reads config.json (and generation_config.json for the end ids) in all the shapes in which GLM
checkpoints occur: GLM-4.1V's text keys stand at the root or in a `text_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from glm_batch.models.checkpoint.directory import read_json, refuse_others
from glm_batch.models.checkpoint.model_config import (
    Family,
    Head,
    MediaTokens,
    ModelConfig,
    ProblemType,
    RopeConfig,
    VisionConfig,
)
from glm_batch.models.errors import ConfigError

ARCHITECTURES: dict[str, tuple[Family, Head]] = {
    "GlmForCausalLM": ("glm", "causal_lm"),
    "Glm4ForCausalLM": ("glm4", "causal_lm"),
    "GlmForSequenceClassification": ("glm", "sequence_classification"),
    "Glm4ForSequenceClassification": ("glm4", "sequence_classification"),
    "GlmForTokenClassification": ("glm", "token_classification"),
    "Glm4ForTokenClassification": ("glm4", "token_classification"),
    "Glm4vForConditionalGeneration": ("glm4v", "causal_lm"),
    "Glm4vForSequenceClassification": ("glm4v", "sequence_classification"),
}
MODEL_TYPES = {
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4v": "Glm4vForConditionalGeneration",
}

# What a missing key means: the defaults of the published configuration classes (glm and glm4 agree
# on these).
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
GLM4V_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "pad_token_id": None,
    "eos_token_id": [],
    "image_token_id": 151343,
    "video_token_id": 151344,
    "image_start_token_id": 151339,
    "image_end_token_id": 151340,
    "video_start_token_id": 151341,
    "video_end_token_id": 151342,
}
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "in_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 4096,
    "intermediate_size": 13696,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# an explicit null is a value; elsewhere it is a missing key
NULLABLE = ("pad_token_id", "problem_type")
BESIDE = ("pad_token_id", "eos_token_id")  # in text_config or at the root beside it
ROOT = (
    "problem_type",
    *(name for name in GLM4V_DEFAULTS if name.startswith(("image_", "video_"))),
)  # at the root alone
REMOTE_CODE = (
    ". This is the layout for remote code; use its sibling whose name ends in -hf, such as "
    "glm-4-9b-chat-hf"
)
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_PARTIAL_ROTARY_FACTOR = 0.5
GLM4V_PARTIAL_ROTARY_FACTOR = 1.0  # the published class's; real checkpoints state 0.5
DEFAULT_MROPE_SECTION = [8, 12, 12]
DTYPES = ("float32", "bfloat16", "float16")


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
    values = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ("rope", "vision", "media_tokens")
    }
    values |= {f"rope.{f.name}": getattr(config.rope, f.name) for f in fields(config.rope)}
    if config.vision and config.media_tokens:
        values |= {
            f"vision.{f.name}": getattr(config.vision, f.name) for f in fields(config.vision)
        }
        values |= {
            f"{f.name}_token_id": getattr(config.media_tokens, f.name)
            for f in fields(config.media_tokens)
        }
    values["num_parameters"] = config.num_parameters
    return [
        Resolved(name=name, value=value, source=resolver.sources.get(name, "computed"))
        for name, value in values.items()
    ]


class _Resolver:
    """Looks keys up where the formats keep them, and notes where each was found."""

    def __init__(self, model_dir: Path) -> None:
        refuse_others(model_dir)
        self.path = model_dir / "config.json"
        self.raw = read_json(self.path)
        self.text = self._section("text_config") or self.raw
        self.defaults = CLASS_DEFAULTS
        self.generation = read_json(model_dir / "generation_config.json", optional=True)
        self.sources: dict[str, str] = {}

    def config(self) -> ModelConfig:
        architecture, family, head = self._architecture()
        is_glm4v = family == "glm4v"
        if is_glm4v:
            self.defaults = CLASS_DEFAULTS | GLM4V_DEFAULTS
        heads, hidden = self._int("num_attention_heads"), self._int("hidden_size")
        kv_heads, head_dim = self._int("num_key_value_heads"), self._head_dim(family, hidden, heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{self.path}: num_attention_heads {heads} is no multiple of num_key_value_heads "
                f"{kv_heads}"
            )
        if (act := self._get("hidden_act")) != "silu":
            raise ConfigError(
                f"{self.path}: {self._key('hidden_act')} {act!r} is not supported; GLM models use "
                "'silu'"
            )
        max_positions = self._int("max_position_embeddings")
        vocab_size = self._int("vocab_size")
        id2label = self._labels()
        return ModelConfig(
            architecture=architecture,
            family=family,
            head=head,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=self._int("intermediate_size"),
            num_hidden_layers=self._int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self._positive(self._key("rms_norm_eps"), self._get("rms_norm_eps")),
            max_position_embeddings=max_positions,
            attention_bias=is_glm4v or self._bool("attention_bias"),
            tie_word_embeddings=self._tied(),
            rope=self._rope(family, head_dim, max_positions),
            dtype=self._dtype(),
            pad_token_id=self._get("pad_token_id"),
            eos_token_ids=self._eos(),
            num_labels=len(id2label),
            id2label=id2label,
            problem_type=self._problem_type(),
            token_classification_bias=self._bool("token_classification_bias"),
            vision=self._vision(hidden) if is_glm4v else None,
            media_tokens=self._media_tokens(vocab_size) if is_glm4v else None,
        )

    def _architecture(self) -> tuple[str, Family, Head]:
        names = self.raw.get("architectures") or []
        model_type = self.raw.get("model_type")
        if not names and model_type in MODEL_TYPES:
            names, source = [MODEL_TYPES[model_type]], "model_type"
        else:
            source = "architectures"
        name = names[0] if names else None
        if name not in ARCHITECTURES:
            raise ConfigError(
                f"{self.path}: architecture {name!r} (model_type {model_type!r}) is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
                + REMOTE_CODE
                * ("auto_map" in self.raw or model_type == "chatglm")
            )
        family, head = ARCHITECTURES[name]
        for key in ("architecture", "family", "head"):
            self.sources[key] = f"{self.path.name}: {source}"
        return name, family, head

    def _section(self, name: str) -> dict[str, Any]:
        section = self.raw.get(name)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{self.path}: {name} is {section!r}; it must be an object")
        return section or {}

    def _get(self, name: str) -> Any:
        """A text model's key from `text_config`, if there is one; ROOT's from the root."""
        places = (
            [("", self.raw)]
            if self.text is self.raw or name in ROOT
            else [("text_config.", self.text)]
        )
        if self.text is not self.raw and name in BESIDE:
            places.append(("", self.raw))
        for prefix, keys in places:
            null_counts = name in NULLABLE and len(places) == 1
            if name in keys and (keys[name] is not None or null_counts):
                self.sources[name] = f"{self.path.name}: {prefix}{name}"
                return keys[name]
        self.sources[name] = "class default"
        return self.defaults.get(name)

    def _key(self, name: str) -> str:
        """Where a value of `_get` stands in the file, or would stand."""
        source = self.sources.get(name, "class default")
        return name if source == "class default" else source.removeprefix(f"{self.path.name}: ")

    def _head_dim(self, family: Family, hidden: int, heads: int) -> int:
        if family != "glm4v":
            return self._int("head_dim")
        if hidden % heads:
            raise ConfigError(
                f"{self.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
            )
        return hidden // heads  # whatever a head_dim says

    def _tied(self) -> bool:
        """True where it is stated: old saves do so in text_config, beside the root's default."""
        name = "tie_word_embeddings"
        self.sources[name] = "class default"
        tied = False
        for prefix, keys in (("", self.raw), (self._prefix, self.text)):
            if not tied and keys.get(name) is not None:
                tied = self._flag(prefix + name, keys[name])
                self.sources[name] = f"{self.path.name}: {prefix}{name}"
        return tied

    def _vision(self, hidden: int) -> VisionConfig:
        """`vision_config`; always axial rotary embedding, whatever type it names."""
        section = self._section("vision_config")
        values = {
            name: self._vision_value(section, name, default)
            for name, default in VISION_DEFAULTS.items()
        }
        if (act := values.pop("hidden_act")) != "silu":
            raise ConfigError(
                f"{self.path}: vision_config.hidden_act {act!r} is not supported; GLM models use "
                "'silu'"
            )
        rope = section.get("rope_parameters")
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        where = "vision_config.rope_parameters.rope_theta"
        self.sources["vision.rope_theta"] = (
            "class default" if theta is None else f"{self.path.name}: {where}"
        )
        theta = self._positive(where, DEFAULT_ROPE_THETA if theta is None else theta)
        vision = VisionConfig(rope_theta=theta, **values)
        self._check_vision(vision, hidden)
        return vision

    def _vision_value(self, section: dict[str, Any], name: str, default: Any) -> Any:
        where, value = f"vision_config.{name}", section.get(name)
        self.sources[f"vision.{name}"] = (
            "class default" if value is None else f"{self.path.name}: {where}"
        )
        if value is None:
            return default
        match default:
            case bool():
                return self._flag(where, value)
            case int():
                return self._positive_int(where, value)
            case float():
                return self._positive(where, value)
        return value

    def _check_vision(self, vision: VisionConfig, hidden: int) -> None:
        problem = ""
        if vision.hidden_size % (4 * vision.num_heads):
            problem = (
                f"hidden_size {vision.hidden_size} is no multiple of 4 * num_heads "
                f"({4 * vision.num_heads}); a head turns in pairs along two axes"
            )
        elif vision.out_hidden_size != hidden:
            problem = (
                f"out_hidden_size is {vision.out_hidden_size}, hidden_size {hidden}; they must be "
                "equal, for features take the place of embeddings"
            )
        elif not vision.grid_size:
            problem = f"image_size {vision.image_size} is less than a patch ({vision.patch_size})"
        if problem:
            raise ConfigError(f"{self.path}: vision_config.{problem}")

    def _media_tokens(self, vocab_size: int) -> MediaTokens:
        ids: dict[str, int] = {}
        for field in fields(MediaTokens):
            name = f"{field.name}_token_id"
            ids[field.name] = value = self._get(name)
            if not _is_int(value) or not 0 <= value < vocab_size:
                raise ConfigError(
                    f"{self.path}: {name} is {value!r}; it must be a token id below vocab_size "
                    f"({vocab_size})"
                )
        return MediaTokens(**ids)

    def _int(self, name: str) -> int:
        value = self._get(name)
        return self._positive_int(self._key(name), value)

    def _positive_int(self, where: str, value: Any) -> int:
        if not _is_int(value) or value < 1:
            raise ConfigError(f"{self.path}: {where} is {value!r}; it must be a positive integer")
        return int(value)

    def _positive(self, where: str, value: Any) -> float:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < float("inf")
        ):
            raise ConfigError(f"{self.path}: {where} is {value!r}; it must be a positive number")
        return float(value)

    def _bool(self, name: str) -> bool:
        value = self._get(name)
        return self._flag(self._key(name), value)

    def _flag(self, where: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {where} is {value!r}; it must be true or false")
        return value

    def _dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        names = ("dtype", "torch_dtype")  # v5 and v4; beside or in text_config
        places = [("", self.raw, name) for name in names] + [
            (self._prefix, self.text, name) for name in names
        ]
        prefix, keys, name = next((place for place in places if place[1].get(place[2])), places[0])
        key, stated = prefix + name, keys.get(name)
        value = str(stated or CLASS_DEFAULTS["dtype"]).removeprefix("torch.")
        self.sources["dtype"] = f"{self.path.name}: {key}" if stated else "class default"
        if value not in DTYPES:
            raise ConfigError(
                f"{self.path}: {key} {value!r} is not supported; one of {', '.join(DTYPES)}"
            )
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
            raise ConfigError(
                f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them"
            )
        return tuple(ids)

    def _labels(self) -> tuple[str, ...]:
        if raw := self.raw.get("id2label"):
            numbers = [str(i) for i in range(len(raw))]
            if not isinstance(raw, dict) or sorted(raw) != sorted(numbers):
                raise ConfigError(
                    f"{self.path}: id2label must number its labels 0 to {len(raw) - 1} without gaps"
                )
            labels = [str(raw[number]) for number in numbers]
            source = f"{self.path.name}: id2label"
        else:
            count = self._positive_int("num_labels", self.raw.get("num_labels") or 2)
            labels = [f"LABEL_{i}" for i in range(count)]
            source = (
                f"{self.path.name}: num_labels" if self.raw.get("num_labels") else "class default"
            )
        self.sources["id2label"] = self.sources["num_labels"] = source
        return tuple(labels)

    def _problem_type(self) -> ProblemType | None:
        value = self._get("problem_type")
        known = ("single_label_classification", "multi_label_classification", "regression")
        if value is not None and value not in known:
            raise ConfigError(
                f"{self.path}: problem_type {value!r} is not one of {', '.join(known)}"
            )
        return value  # type: ignore[no-any-return]

    def _rope(self, family: Family, head_dim: int, max_positions: int) -> RopeConfig:
        """v4 flat, v5 nested and mixed forms; keys in a rope dictionary go first."""
        rope_type = self._rope_get("rope_type", "default")
        if rope_type not in ("default", "linear", "yarn"):
            where = self._rope_where("rope_type")
            raise ConfigError(
                f"{self.path}: {where} {rope_type!r} is not supported; one of default, linear, yarn"
            )
        theta = self._rope_positive("rope_theta", DEFAULT_ROPE_THETA)
        rotary_dim = self._rotary_dim(family, head_dim)
        sections = self._mrope_section(rotary_dim) if family == "glm4v" else ()
        if rope_type == "default":
            return RopeConfig(
                rope_type="default", rope_theta=theta, rotary_dim=rotary_dim, mrope_section=sections
            )
        name = "original_max_position_embeddings"
        original = self._rope_get(
            name, max_positions, default_source=self.sources["max_position_embeddings"]
        )
        original = self._positive_int(self._rope_where(name), original)
        factor = self._rope_get("factor", max_positions / original if rope_type == "yarn" else None)
        if not isinstance(factor, int | float) or factor < 1:
            where = self._rope_where("factor")
            raise ConfigError(
                f"{self.path}: {where} is {factor!r}; {rope_type} scaling needs a number >= 1"
            )
        attention_factor, mscale, mscale_all_dim = (
            None if self._rope_get(name, None) is None else self._rope_positive(name, None)
            for name in ("attention_factor", "mscale", "mscale_all_dim")
        )
        return RopeConfig(
            rope_type=rope_type,
            rope_theta=theta,
            rotary_dim=rotary_dim,
            mrope_section=sections,
            factor=float(factor),
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            beta_fast=self._rope_positive("beta_fast", 32.0),
            beta_slow=self._rope_positive("beta_slow", 1.0),
            mscale=mscale,
            mscale_all_dim=mscale_all_dim,
            truncate=bool(self._rope_get("truncate", True)),
        )

    def _mrope_section(self, rotary_dim: int) -> tuple[int, ...]:
        sections = self._rope_get("mrope_section", DEFAULT_MROPE_SECTION)
        where = self._rope_where("mrope_section")
        if not isinstance(sections, list) or not all(
            _is_int(count) and count >= 0 for count in sections
        ):
            raise ConfigError(
                f"{self.path}: {where} is {sections!r}; it must be a list of numbers of pairs"
            )
        if sum(sections) != rotary_dim // 2:
            raise ConfigError(
                f"{self.path}: {where} {sections} adds up to {sum(sections)} pairs, but "
                f"{rotary_dim // 2} turn; check it and partial_rotary_factor, which means 1 in "
                "this model where it is missing"
            )
        return tuple(sections)

    def _rotary_dim(self, family: Family, head_dim: int) -> int:
        default = (
            GLM4V_PARTIAL_ROTARY_FACTOR if family == "glm4v" else DEFAULT_PARTIAL_ROTARY_FACTOR
        )
        share = self._rope_get("partial_rotary_factor", default)
        where = self._rope_where("partial_rotary_factor")
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"{self.path}: {where} is {share!r}; it must be a number above 0 and at most 1"
            )
        rotary_dim = int(head_dim * share)
        if not rotary_dim or rotary_dim % 2:
            raise ConfigError(
                f"{self.path}: {where} {share} of head_dim {head_dim} is {rotary_dim}; it must be "
                "an even number of dimensions, for they turn in pairs"
            )
        self.sources["rope.rotary_dim"] = self.sources["rope.partial_rotary_factor"] + " x head_dim"
        return rotary_dim

    def _rope_positive(self, name: str, default: float | None) -> float:
        value = self._rope_get(name, default)
        return self._positive(self._rope_where(name), value)

    def _rope_get(self, name: str, default: Any, *, default_source: str = "class default") -> Any:
        """rope_scaling goes before rope_parameters: advice to scale a model is to add it."""
        for section in ("rope_scaling", "rope_parameters", ""):
            keys = self.text.get(section) or {} if section else self.text
            if not isinstance(keys, dict):
                raise ConfigError(
                    f"{self.path}: {self._prefix}{section} is {keys!r}; it must be an object"
                )
            for key in (name, "type") if section and name == "rope_type" else (name,):
                if keys.get(key) is not None:
                    place = f"{self._prefix}{section}{section and '.'}"
                    self.sources[f"rope.{name}"] = f"{self.path.name}: {place}{key}"
                    return keys[key]
        self.sources[f"rope.{name}"] = default_source
        return default

    @property
    def _prefix(self) -> str:
        return "" if self.text is self.raw else "text_config."

    def _rope_where(self, name: str) -> str:
        """The key that a value came from or would belong to."""
        found = self.sources[f"rope.{name}"].removeprefix(f"{self.path.name}: ")
        if found.endswith(("." + name, ".type")) or found == name:
            return found
        section = "rope_scaling" if self.text.get("rope_scaling") else "rope_parameters"
        return f"{self._prefix}{section}.{name}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
