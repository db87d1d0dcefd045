"""A checkpoint's directory: its JSON files, its digest, and what else than a model it may be.

Users name what they have: an adapter, a trainer's output, a file of llama.cpp. Each is told by what
lies there, and refused with what to do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from glm_batch.models.errors import ConfigError

ADAPTER_NAME = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
WHOLE_HASH_BYTES = 64 << 20
SAMPLES_PER_FILE = 64


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint, {} for an optional one that is not there.

    Raises ConfigError when it is missing or holds anything else.
    """
    if optional and not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = f"no such file; the model must be a checkpoint directory with a {path.name}"
        raise ConfigError(f"{path}: {problem}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def refuse_others(model_dir: Path) -> None:
    """Raises ConfigError for what is no whole model, and for a PEFT adapter also beside one."""
    file, config = model_dir / ADAPTER_NAME, model_dir / "config.json"
    if not file.is_file():
        if not config.is_file() and (what := instead_of_weights(model_dir)):
            raise ConfigError(f"{model_dir}: no {config.name} there, but {what}")
        return
    adapter = read_json(file)
    kind, base = adapter.get("peft_type", "PEFT"), adapter.get("base_model_name_or_path")
    raise ConfigError(
        f"{file}: an adapter ({kind} over {base}), which this version does not apply; merge it "
        "into its base (peft: merge_and_unload, then save_pretrained) and name the merged model"
        + (
            f", or move {ADAPTER_NAME} away to use the model beside it as it is"
            if config.is_file()
            else ""
        )
    )


def instead_of_weights(model_dir: Path) -> str:
    """What a directory without weights in safetensors holds, and what to do; "" if nobody knows."""

    def found(*patterns: str) -> list[str]:
        return sorted(path.name for pattern in patterns for path in model_dir.glob(pattern))

    if names := found("model*-of-*.safetensors"):
        return (
            f"{len(names)} shards ({names[0]} ...) without model.safetensors.index.json, which "
            "says what they hold; copy it there"
        )
    if names := found("*.gguf"):
        return f"GGUF ({names[0]}), the format of llama.cpp; use the checkpoint in safetensors"
    if found("zero_to_fp32.py", "global_step*"):
        return "a DeepSpeed directory; convert it with its zero_to_fp32.py --safe_serialization"
    if names := found("pytorch_model_fsdp*", "*.distcp"):
        return f"shards of FSDP ({names[0]}); merge them with accelerate merge-weights"
    if names := found("checkpoint-*"):
        last = max(names, key=lambda name: (len(name), name))
        return f"a trainer's output without a model of its own; name {model_dir / last}"
    if names := found(*PICKLED):
        return (
            f"pickled weights ({', '.join(names[:3])}), which are refused, because pickled weights "
            "can run code; convert the checkpoint to safetensors first"
        )
    return ""


def quantisation(config: dict[str, Any], tensor_names: list[str]) -> str:
    """How the weights are quantised, by config.json or else the tensors' names; "" where not."""
    of_text = config.get("text_config")
    places = (config, of_text if isinstance(of_text, dict) else {})
    form: Any = next((p["quantization_config"] for p in places if p.get("quantization_config")), {})
    if isinstance(mlx := config.get("quantization"), dict):
        return f"MLX int{mlx.get('bits', 4)}"
    match form.get("quant_method") if isinstance(form, dict) else None:
        case "gptq" | "awq" as method:
            return f"{method.upper()} int{form.get('bits', 4)}"
        case "bitsandbytes" if form.get("load_in_8bit"):
            return "bitsandbytes int8"
        case "bitsandbytes":
            return f"bitsandbytes {form.get('bnb_4bit_quant_type', '4 bit')}"
        case "compressed-tensors":
            return f"compressed-tensors {form.get('format', '')}".strip()
        case "fp8":
            return "fine-grained fp8"
        case str(method):
            return method.upper() if method.startswith("exl") else method
    for ending, kind in (
        (".qweight", "GPTQ or AWQ"),
        (".SCB", "bitsandbytes int8"),
        (".absmax", "bitsandbytes 4 bit"),
        (".weight_scale_inv", "fine-grained fp8"),
        (".weight_packed", "compressed-tensors"),
        (".weight_scale", "compressed-tensors"),
    ):
        if any(name.endswith(ending) for name in tensor_names):
            return kind
    return ""


def model_digest(model_dir: str) -> str:
    """A digest over all files: whole if they are small, else names, sizes and samples of each.

    Training changes weights everywhere, so samples tell two checkpoints apart without reading
    gigabytes.
    """
    digest = hashlib.sha256()
    files = sorted(
        path
        for path in Path(model_dir).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    whole = sum(path.stat().st_size for path in files) <= WHOLE_HASH_BYTES
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model_dir)}:{size}\n".encode())
        with path.open("rb") as stream:
            for start in [0] if whole else np.linspace(0, size, SAMPLES_PER_FILE, dtype=int):
                stream.seek(start)
                digest.update(stream.read(size if whole else 1 << 14))
    return digest.hexdigest()[:32]
