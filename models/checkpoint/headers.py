"""What a checkpoint stores, from the headers of its safetensors, and whether that fits.

No tensor is read: a thousand shards take about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.directory import instead_of_weights, quantisation, read_json
from glm_batch.models.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
READ_DTYPES = ("F32", "BF16", "F16")
DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip
# Not of the network, and skipped, as transformers does: tables of old saves, heads of RL trainers.
SKIPPED_ENDING, SKIPPED_BEGINNING = ".rotary_emb.inv_freq", "v_head."

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a shard, under the name that it has there."""

    name: str
    shard: Path
    dtype: str
    shape: Shape


def check_weights(model_dir: str | Path, *, quantised: bool = False) -> None:
    """Raises ConfigError where the weights do not fit config.json, and says what they are instead.

    With `quantised` the tensors of a quantised checkpoint are not compared: vLLM reads some.
    """
    config, path = load_config(model_dir), Path(model_dir)
    if quantised and quantisation(read_json(path / "config.json"), []):
        read_headers(path)
        return
    shapes = config.tensor_shapes()
    copies = {}
    if config.head == "causal_lm" and config.tie_word_embeddings:
        copies["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    match_tensors(path, shapes, copies)


def match_tensors(
    model_dir: Path, wanted: Mapping[str, Shape], copies: Mapping[str, Shape]
) -> dict[str, StoredTensor]:
    """For each wanted name, and each of `copies` that is there, the tensor stored for it.

    Raises ConfigError naming the first missing, unexpected, quantised or wrongly shaped tensors.
    """
    stored = read_headers(model_dir)
    known = {**wanted, **copies}
    found: dict[str, StoredTensor] = {}
    for tensor in stored:
        if tensor.name.endswith(SKIPPED_ENDING) or tensor.name.startswith(SKIPPED_BEGINNING):
            continue
        name = _canonical(tensor.name, known)
        if name in found:
            raise ConfigError(
                f"{tensor.shard}: stores both {found[name].name} and {tensor.name}, which are the "
                "same tensor"
            )
        found[name] = tensor
    problem = _problem(found, wanted, known)
    if not problem:
        return found
    config = read_json(model_dir / "config.json", optional=True)
    if kind := quantisation(config, [tensor.name for tensor in stored]):
        raise ConfigError(
            f"{model_dir}: a quantised checkpoint ({kind}), which the torch engine does not read; "
            f"use the float32, bfloat16 or float16 one, or engine.kind: vllm ({problem})"
        )
    raise ConfigError(f"{model_dir}: {problem}")


def _problem(
    found: Mapping[str, StoredTensor], wanted: Mapping[str, Shape], known: Mapping[str, Shape]
) -> str:
    names = []
    if missing := sorted(wanted.keys() - found.keys()):
        names.append(f"missing: {_some(missing)}")
    if unexpected := sorted(found.keys() - known.keys()):
        names.append(f"unexpected: {_some(unexpected)}")
    if names:
        return (
            f"the tensors do not fit config.json ({'; '.join(names)}); check the architecture, "
            "attention_bias and tie_word_embeddings"
        )
    for name, tensor in found.items():
        where = f"{tensor.shard.name}: tensor {tensor.name}"
        if tensor.shape != known[name]:
            asked = f"{where} is {list(tensor.shape)}, config.json asks for {list(known[name])}"
            if (
                name.endswith(("embed_tokens.weight", "lm_head.weight"))
                and tensor.shape[1:] == known[name][1:]
            ):
                asked += (
                    f": its vocabulary was resized to {tensor.shape[0]}; set vocab_size to that, "
                    "if tokenizer.json has the new tokens"
                )
            return asked
        if tensor.dtype not in READ_DTYPES:
            return (
                f"{where} is stored as {DTYPES.get(tensor.dtype, tensor.dtype)}; quantised "
                "checkpoints are not read: use the float32, bfloat16 or float16 one"
            )
    return ""


def read_headers(model_dir: Path) -> list[StoredTensor]:
    """Every tensor of the checkpoint. Raises ConfigError for files that are absent or broken."""
    if (index := model_dir / INDEX_NAME).exists():
        return _indexed(index)
    if (single := model_dir / SINGLE_NAME).exists():
        return _header(single)
    if what := instead_of_weights(model_dir):
        raise ConfigError(f"{model_dir}: {what}")
    raise ConfigError(
        f"{model_dir}: no {SINGLE_NAME} and no {INDEX_NAME}, so no weights; is this a checkpoint "
        "directory?"
    )


def _indexed(index: Path) -> list[StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ConfigError(
            f"{index}: weight_map must name a file for each tensor; copy the index again"
        )
    found: list[StoredTensor] = []
    for file_name in sorted(set(weight_map.values())):
        shard = index.parent / file_name
        if shard.parent != index.parent or not shard.is_file():
            raise ConfigError(
                f"{index}: names the shard {file_name!r}, which is not in {index.parent}; copy it "
                "there"
            )
        # One that no index names is reported as unexpected.
        found += [
            tensor
            for tensor in _header(shard)
            if weight_map.get(tensor.name, file_name) == file_name
        ]
    if lost := sorted(set(weight_map) - {tensor.name for tensor in found}):
        raise ConfigError(f"{index}: promises tensors that their shards do not hold: {_some(lost)}")
    return found


def _header(shard: Path) -> list[StoredTensor]:
    try:
        with safe_open(shard, framework="np") as file:
            return [_stored(shard, name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{shard}: not a readable safetensors file ({error}); copy it again"
        ) from error


def _stored(shard: Path, name: str, tensor: Any) -> StoredTensor:
    return StoredTensor(name, shard, tensor.get_dtype(), tuple(tensor.get_shape()))


def _canonical(name: str, known: Mapping[str, Shape]) -> str:
    """Old saves and base models saved alone lack `model.`, or `language_model.`, or both."""
    for candidate in (name, f"model.{name}", f"model.language_model.{name.removeprefix('model.')}"):
        if candidate in known:
            return candidate
    return name


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
