"""Checkpoint files into a model: what is loaded, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_batch import models
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.weights import load_weights
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.heads import CausalLMHead
from glm_batch.models.network.registry import BACKBONES, build_model
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]
CPU = torch.device("cpu")
SHARDED = {"max_shard_size": "200KB"}


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """A copy of a single-file checkpoint whose tensors `change` has edited in place."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_refused(path: Path, *words: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(path, dtype=dtype, device=CPU)
    for word in words:
        assert word in str(caught.value)


def logits(path: Path) -> np.ndarray:
    return models.load(path, dtype="float32", kv_cache_tokens=256).logits(random_ids(0, 20))


# Tensors that do not fit


NORM = "model.layers.1.post_self_attn_layernorm.weight"


def test_missing_tensors_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = rewritten(make_checkpoint("glm4"), tmp_path / "c", lambda tensors: tensors.pop(NORM))
    assert_refused(path, f"{path}: ", f"missing: {NORM}", "check the architecture")


def test_many_missing_tensors_are_counted(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def drop_layer(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.2." in name]:
            del tensors[name]

    path = rewritten(make_checkpoint("glm4"), tmp_path / "c", drop_layer)
    assert_refused(path, "missing: model.layers.2.", "and 8 more")  # 13 in all, five of them named


def test_unexpected_tensors_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    change = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(256)}
    path = rewritten(
        make_checkpoint("glm4"), tmp_path / "c", lambda tensors: tensors.update(change)
    )
    assert_refused(path, "unexpected: model.layers.0.self_attn.o_proj.bias")


@pytest.mark.parametrize(("flag", "word"), [(False, "unexpected"), (True, "missing")])
def test_a_wrong_attention_bias_is_noticed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, flag: bool, word: str
) -> None:
    path = rewritten(
        make_checkpoint("glm4", attention_bias=not flag), tmp_path / "c", lambda tensors: None
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_bias": flag}))
    assert_refused(
        path,
        f"{word}: model.layers.0.self_attn.k_proj.bias",
        "check the architecture, attention_bias",
    )


def test_a_wrong_shape_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = rewritten(
        make_checkpoint("glm4"),
        tmp_path / "c",
        lambda tensors: tensors.update({name: torch.ones(4, 4)}),
    )
    assert_refused(
        path, f"model.safetensors: tensor {name} is [4, 4], config.json asks for [256, 320]"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    path = rewritten(
        make_checkpoint("glm4"),
        tmp_path / "c",
        lambda tensors: tensors.update({name: tensors[name].to(dtype)}),
    )
    assert_refused(path, name, f"stored as {str(dtype).removeprefix('torch.')}", "quantised")


# Files that do not fit


def test_broken_files_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = rewritten(make_checkpoint("glm4"), tmp_path / "c", lambda tensors: None)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-100], whole[:50], b""):
        file.write_bytes(part)
        assert_refused(path, f"{file}: not a readable safetensors file", "copy it again")


def test_pickled_weights_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = rewritten(make_checkpoint("glm4"), tmp_path / "c", lambda tensors: None)
    (path / "model.safetensors").unlink()
    assert_refused(path, f"{path}: no model.safetensors and no model.safetensors.index.json")
    (path / "pytorch_model.bin").write_bytes(b"")
    assert_refused(path, f"{path}: pickled weights (pytorch_model.bin)", "can run code", "convert")


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A sharded checkpoint of one's own to break."""
    return shutil.copytree(make_checkpoint("glm4", save=SHARDED), tmp_path / "c")


def edit_index(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    for shard in shards[::2]:
        shard.unlink()
    assert_refused(
        sharded, "model.safetensors.index.json: names the shard", shards[0].name, "copy it there"
    )


def test_an_index_naming_an_absent_tensor_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(extra=next(iter(weight_map.values()))))
    assert_refused(sharded, "index.json: promises tensors that their shards do not hold: extra")


def test_an_index_naming_the_wrong_shard_is_refused(sharded: Path) -> None:
    other = {"model.norm.weight": sorted(sharded.glob("*.safetensors"))[0].name}
    edit_index(sharded, lambda weight_map: weight_map.update(other))
    assert_refused(sharded, "promises tensors that their shards do not hold: model.norm.weight")


def test_a_tensor_that_the_index_forgot_is_found_or_refused(
    sharded: Path, make_checkpoint: MakeCheckpoint
) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    np.testing.assert_array_equal(logits(sharded), logits(make_checkpoint("glm4")))
    shard = sorted(sharded.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"stray": torch.ones(1)}, shard)
    assert_refused(sharded, "unexpected: stray")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "sub/model.safetensors", "/model.safetensors", "..", 5]
)
def test_shards_lie_beside_their_index(
    sharded: Path, make_checkpoint: MakeCheckpoint, name: Any
) -> None:
    for folder in (sharded.parent, sharded / "sub"):
        folder.mkdir(exist_ok=True)
        shutil.copy(make_checkpoint("glm4") / "model.safetensors", folder)
    edit_index(sharded, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, name)))
    assert_refused(sharded, "model.safetensors.index.json: ")


# What is accepted


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_sharded_checkpoints_equal_single_files(
    make_checkpoint: MakeCheckpoint, family: str
) -> None:
    path = make_checkpoint(family, save=SHARDED)
    assert len(list(path.glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(logits(path), logits(make_checkpoint(family)))


def without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("shape", ["gqa4", "mha"])
def test_the_model_prefix_may_be_absent(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, shape: str
) -> None:
    path = rewritten(make_checkpoint("glm4", shape), tmp_path / "c", without_prefix)
    np.testing.assert_array_equal(logits(path), logits(make_checkpoint("glm4", shape)))


def test_a_tensor_stored_under_both_names_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    change = {"norm.weight": torch.ones(256)}
    path = rewritten(
        make_checkpoint("glm4"), tmp_path / "c", lambda tensors: tensors.update(change)
    )
    assert_refused(path, "norm.weight", "model.norm.weight", "the same tensor")


def test_a_tied_checkpoint_may_store_the_same_head_again(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tied = make_checkpoint("glm4", "mha")

    def store_head(tensors: Tensors) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    np.testing.assert_array_equal(logits(rewritten(tied, tmp_path / "c", store_head)), logits(tied))


def test_a_tied_checkpoint_with_another_head_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def store_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    path = rewritten(make_checkpoint("glm4", "mha"), tmp_path / "c", store_head)
    assert_refused(path, "tensor lm_head.weight differs", "set tie_word_embeddings to false")


def test_an_untied_checkpoint_needs_its_head(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = rewritten(
        make_checkpoint("glm4"), tmp_path / "c", lambda tensors: tensors.pop("lm_head.weight")
    )
    assert_refused(path, "missing: lm_head.weight", "tie_word_embeddings")


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_loads_from_every_stored_one(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    def convert(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    path = rewritten(make_checkpoint("glm4"), tmp_path / "c", convert)
    expected = load_oracle(path, dtype).state_dict()
    found = empty_targets(path, dtype, CPU)
    load_weights(path, found)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def empty_targets(path: Path, dtype: torch.dtype, device: torch.device) -> Tensors:
    config = load_config(path)
    backbone = BACKBONES[config.family](config, dtype=dtype, device=device)
    return backbone.targets() | CausalLMHead(config, backbone, dtype=dtype, device=device).targets()


def test_float16_is_for_glm_alone(make_checkpoint: MakeCheckpoint) -> None:
    assert_refused(
        make_checkpoint("glm4"),
        "glm4 in float16 is refused",
        "65504",
        "use bfloat16 or float32",
        dtype=torch.float16,
    )
    model = build_model(make_checkpoint("glm"), dtype=torch.float16, device=CPU)
    assert model.backbone.norm.weight.dtype == torch.float16


# Memory

MEASURE = """
import re, sys, torch
from glm_batch.models.network.registry import build_model

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

load = lambda path: build_model(path, dtype=getattr(torch, sys.argv[3]), device=torch.device("cpu"))
load(sys.argv[1])  # what is paid only once
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
model = load(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_loading_takes_the_model_and_about_one_tensor(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    config = {
        "architectures": ["Glm4ForCausalLM"], "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3,
        "num_attention_heads": 8, "head_dim": 128, "vocab_size": 12288, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = [count * dtype.itemsize for count in write_shards(tmp_path, stored)]
    command = [
        sys.executable,
        "-c",
        MEASURE,
        make_checkpoint("glm4"),
        tmp_path,
        str(dtype).removeprefix("torch."),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    model, largest, slack = sum(sizes), max(sizes), 24 << 20
    assert 0.9 * model < int(run.stdout) < model + largest + slack


def write_shards(path: Path, stored: torch.dtype) -> list[int]:
    """Six shards for the config.json in `path`; returns how many numbers each tensor has."""
    targets = empty_targets(path, stored, torch.device("meta"))
    names = sorted(targets)
    weight_map = {}
    for i in range(6):
        # lm_head comes into the last file, when all else is in memory
        file = f"model-{5 - i}.safetensors"
        save_file(
            {name: torch.ones(targets[name].shape, dtype=stored) for name in names[i::6]},
            path / file,
        )
        weight_map |= dict.fromkeys(names[i::6], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [target.numel() for target in targets.values()]
