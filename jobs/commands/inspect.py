"""`glm-batch inspect`: what a checkpoint resolves to, value by value, each with the file and key it
comes from.

Owns the table alone; models.checkpoint.config_reader resolves, and the checks of a job say what is
wrong with the weight files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glm_batch.models.checkpoint.config_reader import resolve
from glm_batch.models.checkpoint.headers import check_weights
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.tokenizer import Tokenizer

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
Line = tuple[str, str, str]


def inspect(model_dir: str) -> None:
    """Prints every resolved value with its source. Raises ConfigError when the checkpoint cannot be
    used.
    """
    path = Path(model_dir)
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such directory; name a checkpoint in the Hugging Face layout"
        )
    table = Table("name", "value", "from", box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[1].overflow = "fold"
    for line in [*config_lines(path), *tokenizer_lines(path), *weight_lines(path)]:
        table.add_row(*map(Text, line))
    Console(highlight=False).print(table)
    check_weights(path)


def config_lines(path: Path) -> Iterator[Line]:
    """The network and its limits; what only YaRN reads is left out of other checkpoints."""
    values = resolve(path)
    plain_rope = any(each.name == "rope.rope_type" and each.value == "default" for each in values)
    for each in values:
        if plain_rope and each.name.startswith("rope.") and each.source == "computed":
            continue
        value = f"{each.value:,}" if each.name == "num_parameters" else str(each.value)
        yield each.name, value, each.source.removesuffix(f": {each.name}")


def tokenizer_lines(path: Path) -> Iterator[Line]:
    """The tokenizer's ids, and where the chat template lies."""
    tokenizer = Tokenizer.from_dir(str(path))
    yield "tokenizer.vocab_size", str(tokenizer.vocab_size), "tokenizer.json"
    yield "tokenizer.special_ids", str(len(tokenizer.special_ids)), "tokenizer.json"
    yield "tokenizer.raw_prefix", str(tokenizer.encode_raw("")), "tokenizer.json: post_processor"
    try:
        chat = Chat.from_dir(str(path), tokenizer)
    except ConfigError as error:
        yield "chat_template", "none", str(error)
        return
    yield "chat_template", "there", template_source(path)
    yield "chat.thinking", chat.thinking_form, "chat template and control tokens"


def template_source(path: Path) -> str:
    """The first of the places that holds a template."""
    for name in TEMPLATE_FILES:
        file = path / name
        if file.is_file() and (
            file.suffix == ".jinja" or "chat_template" in json.loads(file.read_text("utf-8"))
        ):
            return name
    return "nowhere"


def weight_lines(path: Path) -> Iterator[Line]:
    """The weight files and what they weigh."""
    files = sorted(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    yield (
        "weights",
        f"{len(files)} file(s), {size / 1e6:,.1f} MB",
        ", ".join(file.name for file in files[:3]),
    )
