"""What config.json and generation_config.json mean, in every shape in which GLM checkpoints write
them.

Two oracles: the published numbers (parameter counts), and transformers' own reading of the same
files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from glm_batch.models.checkpoint.config_reader import load_config, resolve
from glm_batch.models.errors import ConfigError

WriteConfig = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteConfig:
    """write(**keys) -> checkpoint directory with that config.json (glm4 unless `architectures` says
    otherwise).
    """

    def write_config(generation: dict[str, Any] | None = None, **keys: Any) -> Path:
        config = {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"} | keys
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write_config


def read_by_transformers(path: Path, family: str) -> Any:
    return {"glm": transformers.GlmConfig, "glm4": transformers.Glm4Config}[family].from_pretrained(
        path
    )


# Rope: the key forms, and which of them wins

# keys -> theta, rotary_dim of a head of 128
ROPE_FORMS: dict[str, tuple[dict[str, Any], float, int]] = {
    "nothing": ({}, 1e4, 64),
    "v4 flat": ({"rope_theta": 5e6, "partial_rotary_factor": 0.25}, 5e6, 32),
    "v4 flat, no scaling": ({"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_scaling": None}, 5e6, 64),
    "v4 without partial_rotary_factor": ({"rope_theta": 5e6}, 5e6, 64),
    "v5": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}}, 5e6, 32),
    "v5 without partial_rotary_factor": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, 5e6, 64),
    "v5 without theta": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, 1e4, 128),
    "mixed": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "partial_rotary_factor": 0.25}, 5e6, 32),
    "inner keys win": (
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.25}, "rope_theta": 7.0,
         "partial_rotary_factor": 1.0}, 5e6, 32,
    ),
    "type is an alias": ({"rope_scaling": {"type": "default", "mrope_section": [8]}, "rope_theta": 5e6}, 5e6, 64),
    "an explicit null is a missing key": ({"rope_theta": None, "partial_rotary_factor": None}, 1e4, 64),
}  # fmt: skip


@pytest.mark.parametrize("form", ROPE_FORMS)
@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_rope_keys_in_every_form(write: WriteConfig, family: str, form: str) -> None:
    keys, theta, rotary_dim = ROPE_FORMS[form]
    architecture = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}[family]
    rope = load_config(write(architectures=[architecture], model_type=family, **keys)).rope
    assert (rope.rope_type, rope.rope_theta, rope.rotary_dim, rope.factor) == (
        "default",
        theta,
        rotary_dim,
        1.0,
    )


@pytest.mark.parametrize(
    "form", [form for form in ROPE_FORMS if "null" not in form and "win" not in form]
)
def test_rope_forms_are_read_as_transformers_does(write: WriteConfig, form: str) -> None:
    path = write(**ROPE_FORMS[form][0])
    ours, theirs = load_config(path).rope, read_by_transformers(path, "glm4").rope_parameters
    assert (ours.rope_theta, ours.rotary_dim) == (
        theirs["rope_theta"],
        int(128 * theirs["partial_rotary_factor"]),
    )


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("alias", ["type", "rope_type"])
def test_yarn_in_both_dictionaries_and_under_both_names(
    write: WriteConfig, name: str, alias: str
) -> None:
    scaling = {
        alias: "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 16,
    }
    rope = load_config(
        write(**{name: scaling}, max_position_embeddings=131072, rope_theta=5e6)
    ).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == (
        "yarn",
        4.0,
        32768,
    )
    assert (rope.rope_theta, rope.rotary_dim, rope.beta_fast, rope.beta_slow) == (
        5e6,
        64,
        16.0,
        1.0,
    )


def test_yarn_without_factor_or_original_length(write: WriteConfig) -> None:
    """The factor is then the ratio of the lengths, and the original length the checkpoint's own."""
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
    assert (
        load_config(write(rope_scaling=scaling, max_position_embeddings=65536)).rope.factor == 2.0
    )
    scaling = {"rope_type": "yarn", "factor": 4}
    rope = load_config(write(rope_scaling=scaling, max_position_embeddings=32768)).rope
    assert (rope.factor, rope.original_max_position_embeddings) == (4.0, 32768)


def test_a_rope_scaling_added_to_a_v5_config_takes_effect(write: WriteConfig) -> None:
    """As the published advice on long inputs has it; the default type beside it must not switch it
    off.
    """
    v5 = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    rope = load_config(write(rope_parameters=v5, rope_scaling={"type": "yarn", "factor": 4.0})).rope
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("yarn", 4.0, 5e6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama3", "su"])
def test_other_rope_types_are_refused(write: WriteConfig, kind: str) -> None:
    path = write(rope_parameters={"rope_type": kind, "factor": 2.0})
    message = rf"config\.json: rope_parameters\.rope_type '{kind}' is not supported; one of default, linear, yarn"
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("factor", [None, 0.5, "4"])
def test_linear_scaling_needs_a_factor(write: WriteConfig, factor: Any) -> None:
    path = write(rope_scaling={"rope_type": "linear", "factor": factor})
    with pytest.raises(
        ConfigError, match=r"config\.json: rope_scaling\.factor is .*needs a number >= 1"
    ):
        load_config(path)


# The other keys


def test_class_defaults(write: WriteConfig) -> None:
    """What no file says: the published classes' own values, eps 1.5625e-07 among them."""
    ours = load_config(write())
    theirs = transformers.Glm4Config()
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "attention_bias",
        "tie_word_embeddings", "pad_token_id", "num_labels",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rms_norm_eps == 1.5625e-07
    assert ours.eos_token_ids == tuple(theirs.eos_token_id)
    assert (ours.dtype, ours.id2label, ours.problem_type) == (
        "float32",
        ("LABEL_0", "LABEL_1"),
        None,
    )


@pytest.mark.parametrize(
    "keys", [{"attention_bias": False}, {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": True}]
)
def test_stated_values_win_over_defaults(write: WriteConfig, keys: dict[str, Any]) -> None:
    (name, value), config = *keys.items(), load_config(write(**keys))
    assert getattr(config, name) == value


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_dtype_under_both_names(write: WriteConfig, key: str, value: str) -> None:
    assert load_config(write(**{key: value})).dtype == "bfloat16"


def test_the_new_name_of_dtype_wins(write: WriteConfig) -> None:
    assert load_config(write(dtype="bfloat16", torch_dtype="float16")).dtype == "bfloat16"


@pytest.mark.parametrize("stated", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}])
def test_end_ids_come_from_generation_config_first(
    write: WriteConfig, stated: dict[str, Any]
) -> None:
    assert load_config(write(generation={"eos_token_id": [5, 6]}, **stated)).eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("stated", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, (151329, 151336, 151338))]
)
@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}])
def test_end_ids_without_generation_config(
    write: WriteConfig, generation: dict[str, Any] | None, stated: Any, ids: tuple[int, ...]
) -> None:
    assert load_config(write(generation=generation, eos_token_id=stated)).eos_token_ids == ids


@pytest.mark.parametrize("pad", [7, None])
def test_no_padding_token_is_not_the_default_one(write: WriteConfig, pad: int | None) -> None:
    path = write(pad_token_id=pad)
    assert load_config(path).pad_token_id == read_by_transformers(path, "glm4").pad_token_id == pad


def test_labels(write: WriteConfig) -> None:
    architecture = ["GlmForSequenceClassification"]
    labelled = load_config(
        write(architectures=architecture, id2label={"1": "no", "0": "yes", "2": "maybe"})
    )
    assert (labelled.num_labels, labelled.id2label) == (3, ("yes", "no", "maybe"))
    counted = load_config(write(architectures=architecture, num_labels=3))
    assert (counted.num_labels, counted.id2label) == (3, ("LABEL_0", "LABEL_1", "LABEL_2"))


@pytest.mark.parametrize(
    ("architecture", "family", "head"),
    [
        ("GlmForCausalLM", "glm", "causal_lm"),
        ("Glm4ForCausalLM", "glm4", "causal_lm"),
        ("GlmForSequenceClassification", "glm", "sequence_classification"),
        ("Glm4ForTokenClassification", "glm4", "token_classification"),
    ],
)
def test_architectures(write: WriteConfig, architecture: str, family: str, head: str) -> None:
    config = load_config(write(architectures=[architecture]))
    assert (config.architecture, config.family, config.head) == (architecture, family, head)


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_without_architectures_the_model_type_is_a_causal_model(
    write: WriteConfig, model_type: str
) -> None:
    config = load_config(write(architectures=None, model_type=model_type))
    assert (config.family, config.head) == (model_type, "causal_lm")


# What is refused: the file, the key, what to do

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        r"architecture 'LlamaForCausalLM' \(model_type 'llama'\) is not supported; supported: GlmForCausalLM, ",
    ),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported; GLM models use 'silu'"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, r"torch_dtype 'float8_e4m3fn' is not supported; one of float32, "),
    "no integer": ({"hidden_size": "4096"}, r"hidden_size is '4096'; it must be a positive integer"),
    "zero": ({"num_hidden_layers": 0}, r"num_hidden_layers is 0; it must be a positive integer"),
    "eps": ({"rms_norm_eps": "small"}, r"rms_norm_eps is 'small'; it must be a positive number"),
    "eps 0": ({"rms_norm_eps": 0}, r"rms_norm_eps is 0; it must be a positive number"),
    "theta": ({"rope_theta": "1e4"}, r"rope_theta is '1e4'; it must be a positive number"),
    "rotary share": ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1.5; .*above 0 and at most 1"),
    "odd rotary share": (
        {"head_dim": 6, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor 0.5 of head_dim 6 .*even number of dimensions",
    ),
    "flag": ({"attention_bias": "false"}, r"attention_bias is 'false'; it must be true or false"),
    "end ids": ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\]; it must be a token id or a list of them"),
    "rope dictionary": ({"rope_scaling": "yarn"}, r"rope_scaling is 'yarn'; it must be an object"),
    "heads": (
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        r"num_attention_heads 6 is no multiple of num_key_value_heads 4",
    ),
    "label gap": ({"id2label": {"0": "a", "2": "b"}}, r"id2label must number its labels 0 to 1 without gaps"),
    "label number": ({"id2label": {"a": 0}}, r"id2label must number its labels 0 to 0 without gaps"),
    "label count": ({"num_labels": "three"}, r"num_labels is 'three'; it must be a positive integer"),
    "problem type": ({"problem_type": "ranking"}, r"problem_type 'ranking' is not one of single_label_classif"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_file_key_and_remedy(write: WriteConfig, case: str) -> None:
    keys, message = REFUSED[case]
    with pytest.raises(ConfigError, match=r"config\.json: (rope_\w+\.)?" + message):
        load_config(write(**keys))


@pytest.mark.parametrize("text", ["{", "[1]", '{"hidden_size": 1'])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: no such file; the model must be a checkpoint directory"
    ):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.json: (cannot be read as JSON|expected a JSON object)"
    ):
        load_config(tmp_path)


# The whole


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "glm 9B": ({"architectures": ["GlmForCausalLM"], "model_type": "glm"}, 9_399_951_360),
    "glm4 9B": ({}, 9_400_279_040),
    "glm4 32B": (
        {"hidden_size": 6144, "intermediate_size": 23040, "num_hidden_layers": 61, "num_attention_heads": 48,
         "attention_bias": False},
        32_566_081_536,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameter_counts_of_the_published_models(write: WriteConfig, model: str) -> None:
    keys, count = PUBLISHED[model]
    assert load_config(write(**keys)).num_parameters == count


@pytest.mark.parametrize(
    "head", ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts_equal_transformers(write: WriteConfig, head: str, tied: bool) -> None:
    path = write(
        architectures=[f"Glm4{head}"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, vocab_size=300, pad_token_id=0, num_labels=5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = getattr(transformers, f"Glm4{head}")(read_by_transformers(path, "glm4"))
    assert load_config(path).num_parameters == sum(p.numel() for p in model.parameters())


def test_resolve_names_the_source_of_each_value(write: WriteConfig) -> None:
    path = write(
        generation={"eos_token_id": [5]},
        hidden_size=64,
        max_position_embeddings=4096,
        torch_dtype="bfloat16",
        rope_scaling={"type": "yarn", "factor": 4.0},
        rope_theta=5e6,
        id2label={"0": "a"},
    )
    found = {resolved.name: resolved for resolved in resolve(path)}
    sources = {
        "architecture": "config.json: architectures",
        "hidden_size": "config.json: hidden_size",
        "rms_norm_eps": "class default",
        "dtype": "config.json: torch_dtype",
        "eos_token_ids": "generation_config.json: eos_token_id",
        "num_labels": "config.json: id2label",
        "rope.rope_type": "config.json: rope_scaling.type",
        "rope.rope_theta": "config.json: rope_theta",
        "rope.factor": "config.json: rope_scaling.factor",
        "rope.rotary_dim": "class default x head_dim",
        "rope.original_max_position_embeddings": "config.json: max_position_embeddings",
        "rope.beta_fast": "class default",
        "num_parameters": "computed",
    }
    assert {name: found[name].source for name in sources} == sources
    assert found["rope.rope_theta"].value == 5e6
    assert found["hidden_size"].value == 64


def test_resolve_tells_two_rope_dictionaries_apart(write: WriteConfig) -> None:
    path = write(rope_scaling={"rope_theta": 5e6}, rope_parameters={"partial_rotary_factor": 0.25})
    found = {resolved.name: resolved.source for resolved in resolve(path)}
    assert found["rope.rope_theta"] == "config.json: rope_scaling.rope_theta"
    assert (
        found["rope.rotary_dim"] == "config.json: rope_parameters.partial_rotary_factor x head_dim"
    )


# GLM-4.1V: text keys in text_config or at the root, and a vision tower

ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
V4_ROPE = {
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]},
}
GLM4V: dict[str, dict[str, Any]] = {
    "nested": {"text_config": {"rope_parameters": ROPE}, "vision_config": {}},
    "nested, v4 rope": {
        "text_config": V4_ROPE,
        "vision_config": {"rope_parameters": {"rope_type": "default"}},
    },
    "flat": {**V4_ROPE, "vision_config": {}},
    "flat without vision_config": {"rope_parameters": ROPE},
}


@pytest.fixture
def write_glm4v(write: WriteConfig) -> WriteConfig:
    def write_config(**keys: Any) -> Path:
        return write(
            **({"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v"} | keys)
        )

    return write_config


def nested(**keys: Any) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": ROPE} | keys}


@pytest.mark.parametrize("form", GLM4V)
def test_glm4v_in_every_form(write_glm4v: WriteConfig, form: str) -> None:
    config = load_config(write_glm4v(**GLM4V[form]))
    assert (config.family, config.head, config.head_dim, config.rms_norm_eps) == (
        "glm4v",
        "causal_lm",
        128,
        1e-5,
    )
    assert (config.rope.rotary_dim, config.rope.mrope_section) == (64, (8, 12, 12))
    assert (config.max_position_embeddings, config.pad_token_id, config.eos_token_ids) == (
        32768,
        None,
        (),
    )
    assert config.vision is not None
    assert config.media_tokens is not None
    assert (config.vision.depth, config.vision.grid_size, config.vision.rope_theta) == (24, 24, 1e4)
    assert (config.media_tokens.image, config.media_tokens.video_end) == (151343, 151342)
    assert config.num_parameters == 10_292_777_472
    assert config.vision.num_parameters == 892_498_432


@pytest.mark.parametrize("form", GLM4V)
def test_glm4v_is_read_as_transformers_does(write_glm4v: WriteConfig, form: str) -> None:
    path = write_glm4v(**GLM4V[form])
    ours, theirs = load_config(path), transformers.Glm4vConfig.from_pretrained(path)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
    ):
        assert getattr(ours, name) == getattr(theirs.text_config, name), name
    for name in (
        "depth",
        "hidden_size",
        "num_heads",
        "out_hidden_size",
        "intermediate_size",
        "rms_norm_eps",
    ):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name), name
    assert theirs.text_config.rope_parameters["partial_rotary_factor"] == 0.5
    for name in ("image", "video_start"):
        assert getattr(ours.media_tokens, name) == getattr(theirs, f"{name}_token_id"), name


def test_glm4v_always_has_biases_and_no_head_dim_of_its_own(write_glm4v: WriteConfig) -> None:
    keys = nested(attention_bias=False, head_dim=64, hidden_size=2048, num_attention_heads=16)
    config = load_config(write_glm4v(**keys, vision_config={"out_hidden_size": 2048}))
    assert (config.attention_bias, config.head_dim) == (True, 128)


def test_ids_stand_beside_or_in_text_config(write_glm4v: WriteConfig) -> None:
    inside = load_config(write_glm4v(**nested(pad_token_id=5, eos_token_id=[6, 7])))
    beside = load_config(
        write_glm4v(**nested(pad_token_id=None), pad_token_id=5, eos_token_id=[6, 7])
    )
    assert (
        (inside.pad_token_id, inside.eos_token_ids)
        == (beside.pad_token_id, beside.eos_token_ids)
        == (5, (6, 7))
    )


@pytest.mark.parametrize("place", ["root", "text_config"])
def test_tied_embeddings_and_dtype_in_both_places(write_glm4v: WriteConfig, place: str) -> None:
    stated = {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    keys = (
        {**nested(), **stated}
        if place == "root"
        else {**nested(**stated), "tie_word_embeddings": False}
    )
    config = load_config(write_glm4v(**keys))
    assert (config.tie_word_embeddings, config.dtype) == (True, "bfloat16")


def test_glm4v_classifier(write_glm4v: WriteConfig) -> None:
    config = load_config(
        write_glm4v(
            architectures=["Glm4vForSequenceClassification"],
            id2label={"0": "a", "1": "b"},
            **nested(),
        )
    )
    assert (config.head, config.id2label) == ("sequence_classification", ("a", "b"))
    assert config.num_parameters == 10_292_777_472 - 151552 * 4096 + 2 * 4096


def test_glm4v_sources_name_the_section(write_glm4v: WriteConfig) -> None:
    path = write_glm4v(**nested(hidden_size=4096), vision_config={"depth": 3}, image_token_id=9)
    found = {resolved.name: resolved.source for resolved in resolve(path)}
    assert found["hidden_size"] == "config.json: text_config.hidden_size"
    assert found["rope.mrope_section"] == "config.json: text_config.rope_parameters.mrope_section"
    assert found["vision.depth"] == "config.json: vision_config.depth"
    assert (found["image_token_id"], found["video_token_id"]) == (
        "config.json: image_token_id",
        "class default",
    )
    assert found["vision.hidden_size"] == "class default"


REFUSED_GLM4V: dict[str, tuple[dict[str, Any], str]] = {
    "no partial_rotary_factor": (
        {"text_config": {}}, r"mrope_section \[8, 12, 12\] adds up to 32 pairs, but 64 turn; .*partial_rotary_factor",
    ),
    "sections": (nested(rope_parameters=ROPE | {"mrope_section": "8"}), r"mrope_section is '8'; .*list of numbers"),
    "text": (nested(hidden_size=0), r"text_config\.hidden_size is 0; it must be a positive integer"),
    "text section": ({"text_config": [1]}, r"text_config is \[1\]; it must be an object"),
    "vision number": ({**nested(), "vision_config": {"depth": -1}}, r"vision_config\.depth is -1; .*positive integer"),
    "vision flag": ({**nested(), "vision_config": {"attention_bias": 1}}, r"vision_config\.attention_bias is 1; "),
    "vision activation": (
        {**nested(), "vision_config": {"hidden_act": "gelu"}}, r"vision_config\.hidden_act 'gelu' is not supported",
    ),
    "vision heads": ({**nested(), "vision_config": {"num_heads": 7}}, r"hidden_size 1536 is no multiple of 4"),
    "widths": ({**nested(), "vision_config": {"out_hidden_size": 64}}, r"out_hidden_size is 64, hidden_size 4096"),
    "small image": ({**nested(), "vision_config": {"image_size": 13}}, r"vision_config\.image_size 13 is less than"),
    "ids": ({**nested(), "image_token_id": 151552}, r"image_token_id is 151552; .* below vocab_size \(151552\)"),
    "heads": (nested(num_attention_heads=24), r"hidden_size 4096 is no multiple of num_attention_heads 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_GLM4V)
def test_a_glm4v_that_cannot_run_is_refused(write_glm4v: WriteConfig, case: str) -> None:
    keys, message = REFUSED_GLM4V[case]
    with pytest.raises(
        ConfigError,
        match=r"config\.json: (text_config\.)?(rope_\w+\.)?(vision_config\.)?" + message,
    ):
        load_config(write_glm4v(**keys))
