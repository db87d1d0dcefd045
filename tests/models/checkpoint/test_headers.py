"""Weight files against config.json by their headers: what fits, and what kind the others are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from glm_batch import models
from glm_batch.models.checkpoint.config_reader import ARCHITECTURES, load_config
from glm_batch.models.checkpoint.headers import check_weights
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.heads import CausalLMHead, ClassificationHead
from glm_batch.models.network.registry import BACKBONES
from glm_batch.models.network.vision import VisionTower
from tests.models.conftest import MakeCheckpoint, random_ids

Tensors = dict[str, torch.Tensor]
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "pad_token_id": None,
}  # fmt: skip
MEDIA = {f"{name}_token_id": i for i, name in enumerate(
    ("image", "video", "image_start", "image_end", "video_start", "video_end")
)}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 20,
    "image_size": 28,
}  # fmt: skip


def write_config(folder: Path, architecture: str, **keys: Any) -> Path:
    config = {**SMALL, **MEDIA, "architectures": [architecture], "num_labels": 3, **keys}
    if architecture.startswith("Glm4v"):
        rope = {"partial_rotary_factor": 1.0, "mrope_section": [1, 1, 0]}
        config |= {"vision_config": VISION, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("flag", [False, True])
def test_a_configuration_names_the_tensors_that_the_network_takes(
    tmp_path: Path, architecture: str, flag: bool
) -> None:
    """Two lists of the same tensors: that of the configuration needs no torch."""
    flags = {"attention_bias": flag, "tie_word_embeddings": flag, "token_classification_bias": flag}
    config = load_config(write_config(tmp_path, architecture, **flags))
    place: Any = {"dtype": torch.float32, "device": torch.device("meta")}
    backbone = BACKBONES[config.family](config, **place)
    head = (
        CausalLMHead(config, backbone, **place)
        if config.head == "causal_lm"
        else ClassificationHead(config, **place)
    )
    targets = backbone.targets() | head.targets()
    if config.vision:
        targets |= VisionTower(config.vision, **place).targets()
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    assert config.tensor_shapes() == shapes
    assert config.num_parameters == sum(target.numel() for target in targets.values())  # type: ignore[union-attr]


@pytest.fixture
def copy(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint of one's own to break."""
    return shutil.copytree(make_checkpoint("glm4"), tmp_path / "c")


def change(path: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def configure(path: Path, **keys: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(path)
    return str(caught.value)


def test_a_whole_checkpoint_is_accepted(make_checkpoint: MakeCheckpoint) -> None:
    check_weights(make_checkpoint("glm4", save={"max_shard_size": "200KB"}))
    check_weights(make_checkpoint("glm", "mha"))


def quantised(ending: str, dtype: torch.dtype, scale: str) -> Callable[[Tensors], Tensors]:
    """Each projection as integers, or fp8, under another name, and its scales."""

    def edit(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith("proj.weight"):
                layer = name.removesuffix(".weight")
                found[f"{layer}.{ending}"] = tensor.to(dtype)
                found[f"{layer}.{scale}"] = torch.ones(1)
            else:
                found[name] = tensor
        return found

    return edit


FP8 = quantised("weight", torch.float8_e4m3fn, "weight_scale")
GPTQ = quantised("qweight", torch.int32, "scales")
BNB8 = quantised("weight", torch.int8, "SCB")
BNB4 = quantised("weight", torch.uint8, "weight.absmax")
BLOCKS = quantised("weight", torch.float8_e4m3fn, "weight_scale_inv")


@pytest.mark.parametrize(
    ("edit", "form", "kind"),
    [
        (FP8, {"quant_method": "compressed-tensors", "format": "float"}, "compressed-tensors float"),
        (FP8, {}, "compressed-tensors"),
        (GPTQ, {"quant_method": "gptq", "bits": 4}, "GPTQ int4"),
        (GPTQ, {"quant_method": "awq", "bits": 4}, "AWQ int4"),
        (GPTQ, {"quant_method": "exl2"}, "EXL2"),
        (GPTQ, {}, "GPTQ or AWQ"),
        (BNB8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        (BNB8, {}, "bitsandbytes int8"),
        (BNB4, {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
        (BNB4, {}, "bitsandbytes 4 bit"),
        (BLOCKS, {"quant_method": "fp8"}, "fine-grained fp8"),
        (BLOCKS, {}, "fine-grained fp8"),
    ],
)  # fmt: skip
def test_quantised_checkpoints_are_called_by_their_name(
    copy: Path, edit: Callable[[Tensors], Tensors], form: dict[str, Any], kind: str
) -> None:
    change(copy, edit)
    if form:
        configure(copy, quantization_config=form)
    assert f"{copy}: a quantised checkpoint ({kind})" in refusal(copy)
    assert "engine.kind: vllm" in refusal(copy)
    if form:
        check_weights(copy, quantised=True)  # vLLM has its own reader


def test_mlx_is_called_by_its_name(copy: Path) -> None:
    change(copy, GPTQ)
    configure(copy, quantization={"group_size": 64, "bits": 4})
    assert "a quantised checkpoint (MLX int4)" in refusal(copy)


def test_a_resized_vocabulary_is_recognised(copy: Path) -> None:
    def resize(tensors: Tensors) -> Tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
        return tensors

    change(copy, resize)
    assert "its vocabulary was resized to 520; set vocab_size" in refusal(copy)
    configure(copy, vocab_size=520)
    check_weights(copy)


def rename(path: Path, *names: str, folder: bool = False) -> None:
    """In the place of the weights, these files or folders."""
    (path / "model.safetensors").unlink()
    for name in names:
        (path / name).mkdir() if folder else (path / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("names", "folder", "said"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], False, "2 shards"),
        (["GLM-4-Q4_K_M.gguf"], False, "GGUF (GLM-4-Q4_K_M.gguf)"),
        (["zero_to_fp32.py"], False, "a DeepSpeed directory"),
        (["global_step500"], True, "a DeepSpeed directory"),
        (["pytorch_model_fsdp_0"], True, "shards of FSDP"),
        (["checkpoint-90", "checkpoint-500"], True, "name {path}/checkpoint-500"),
        (["pytorch_model.bin"], False, "pickled weights (pytorch_model.bin)"),
        ([], False, "so no weights"),
    ],
)  # fmt: skip
def test_directories_without_weights_are_told_apart(
    copy: Path, names: list[str], folder: bool, said: str
) -> None:
    rename(copy, *names, folder=folder)
    assert said.format(path=copy) in refusal(copy)


def test_what_else_lies_there_is_told_where_there_is_no_config_either(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "GGUF" in refusal(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_also_beside_a_whole_model(copy: Path, beside: bool) -> None:
    """It once was ignored: the answers were those of the base, without a word."""
    if not beside:
        rename(copy)
        (copy / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "zai-org/GLM-4-9B-0414"}
    (copy / "adapter_config.json").write_text(json.dumps(adapter))
    message = refusal(copy)
    assert f"{copy}/adapter_config.json: an adapter (LORA over zai-org/GLM-4-9B-0414)" in message
    assert "merge it into its base" in message
    assert ("move adapter_config.json away" in message) == beside
    with pytest.raises(ConfigError, match="an adapter"):
        models.load(copy)


def test_remote_code_is_pointed_at_its_sibling(copy: Path) -> None:
    configure(copy, architectures=["ChatGLMForConditionalGeneration"], model_type="chatglm")
    assert "-hf" in refusal(copy)


def test_tables_and_value_heads_are_skipped(copy: Path, make_checkpoint: MakeCheckpoint) -> None:
    """As transformers does: neither takes part in the network."""
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "v_head.summary.weight": torch.ones(1, 256),
    }
    change(copy, lambda tensors: tensors | extra)
    check_weights(copy)
    logits = [
        models.load(path, dtype="float32", kv_cache_tokens=256).logits(random_ids(0, 20))
        for path in (copy, make_checkpoint("glm4"))
    ]
    np.testing.assert_array_equal(*logits)


def test_a_thousand_shards_take_less_than_three_seconds(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, "Glm4ForCausalLM", num_hidden_layers=700))
    names = sorted(config.tensor_shapes().items())
    weight_map = {}
    for i in range(1000):
        file = f"model-{i + 1:05d}-of-01000.safetensors"
        save_numpy(
            {name: np.zeros(shape, np.float16) for name, shape in names[i::1000]}, tmp_path / file
        )
        weight_map |= dict.fromkeys((name for name, _ in names[i::1000]), file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = time.process_time()
    check_weights(tmp_path)
    assert time.process_time() - started < 3.0


def test_the_check_needs_no_torch(make_checkpoint: MakeCheckpoint) -> None:
    code = (
        "import sys\nfrom glm_batch.models.checkpoint.headers import check_weights\n"
        f"check_weights({str(make_checkpoint('glm4'))!r})\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
