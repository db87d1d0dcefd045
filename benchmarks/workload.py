"""The rows of the comparisons: built once as text and token ids, written to a file that every
system reads.

Owns the kinds of work (choose, generate, images), the lengths of their prompts and how much
arithmetic they need. Standard library only at module level, so that every peer's interpreter can
read the rows.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

WorkKind = Literal["choose", "generate", "images"]
TextKind = Literal["choose", "generate"]
DEFAULT_ROWS: dict[WorkKind, int] = {"choose": 512, "generate": 64, "images": 512}
SHARED_TOKENS: dict[TextKind, int] = {"choose": 410, "generate": 128}
OWN_TOKENS: dict[TextKind, int] = {"choose": 84, "generate": 128}
OUTPUT_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt: the user message (instruction + text) and the ids of its rendered chat.

    Of images, `text` is the path of a JPEG and there are no ids: each system makes its own.
    """

    id: str
    text: str
    input_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSet:
    """Rows with one shared instruction. `label_ids` are the labels' single tokens, of images their
    first ones.
    """

    work: WorkKind
    instruction: str
    labels: list[str]
    label_ids: list[int]
    rows: list[Row]

    def message(self, row: Row) -> str:
        """The user message of a row."""
        return self.instruction + row.text


def read_rows(path: Path) -> RowSet:
    """Reads what `write_rows` has written."""
    data = json.loads(path.read_text())
    return RowSet(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def write_rows(
    model_dir: Path, work: TextKind, num_rows: int, set_index: int, directory: Path
) -> Path:
    """Builds set `set_index` of a work (another index: another instruction and other rows) and
    returns its file.
    """
    path = directory / f"{work}-{num_rows}x-{set_index}.json"
    path.write_text(json.dumps(asdict(build_rows(model_dir, work, num_rows, set_index))))
    return path


def write_image_rows(model_dir: Path, num_rows: int, directory: Path) -> Path:
    """JPEGs of 640x480 that look like photos, every one different, and the file that names them."""
    from tokenizers import Tokenizer

    from benchmarks.photos import photos

    folder = directory / f"images-{num_rows}x"
    folder.mkdir(exist_ok=True)
    rows = []
    for number, data in enumerate(photos(num_rows, 640, 480)):
        photo = folder / f"{number:05d}.jpg"
        photo.write_bytes(data)
        rows.append(Row(id=f"image-{number}", text=str(photo), input_ids=[]))
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    labels = ["circle", "square", "triangle"]
    label_ids = [tokenizer.encode(label, add_special_tokens=False).ids[0] for label in labels]
    row_set = RowSet(
        work="images",
        instruction="Which shape is it?",
        labels=labels,
        label_ids=label_ids,
        rows=rows,
    )
    path = directory / f"images-{num_rows}x.json"
    path.write_text(json.dumps(asdict(row_set)))
    return path


def build_rows(model_dir: Path, work: TextKind, num_rows: int, set_index: int) -> RowSet:
    """Rows of exactly SHARED_TOKENS + OWN_TOKENS ids each; raises ValueError where the tokenizer
    cannot give that.
    """
    import jinja2
    from tokenizers import Tokenizer

    from benchmarks.make_mid_model import LABELS, make_words

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    template = jinja2.Template(
        (model_dir / "chat_template.jinja").read_text(), trim_blocks=True, lstrip_blocks=True
    )

    def encode(message: str) -> list[int]:
        messages = [{"role": "user", "content": message}]
        text = template.render(messages=messages, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    rng = random.Random(f"{work}/{set_index}")
    candidates = make_words(6000)
    words = [w for w in candidates if len(tokenizer.encode(" " + w).ids) == 1]
    starters = [w for w in candidates if len(tokenizer.encode(w).ids) == 1]
    # the chat's opening tokens; the last one, <|assistant|>, belongs to the row's own
    header = len(encode("")) - 1
    shared = SHARED_TOKENS[work] - header
    own = OWN_TOKENS[work] - 1
    instruction = rng.choice(starters) + "".join(" " + rng.choice(words) for _ in range(shared - 1))
    texts = ["".join(" " + rng.choice(words) for _ in range(own)) for _ in range(num_rows)]
    rows = [
        Row(id=f"{work}-{set_index}-{i}", text=text, input_ids=encode(instruction + text))
        for i, text in enumerate(texts)
    ]
    wanted = SHARED_TOKENS[work] + OWN_TOKENS[work]
    lengths = {len(row.input_ids) for row in rows}
    if lengths != {wanted}:
        raise ValueError(
            f"{model_dir}: prompts have {sorted(lengths)} tokens, {wanted} were wanted"
        )
    label_ids = [tokenizer.encode(label).ids for label in LABELS]
    if any(len(ids) != 1 for ids in label_ids):
        raise ValueError(f"{model_dir}: the labels {LABELS} are not one token each: {label_ids}")
    return RowSet(
        work=work,
        instruction=instruction,
        labels=list(LABELS),
        label_ids=[ids[0] for ids in label_ids],
        rows=rows,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Matrix-product FLOPs a work cannot avoid, the shared instruction counted once; attention is
    not in it.
    """

    prefill: float
    decode: float

    def limit_s(self, prefill_rate: float, decode_rate: float) -> float:
        """Seconds at the given rates (FLOP/s): what a system without any other cost would need."""
        return self.prefill / prefill_rate + self.decode / decode_rate


def arithmetic(work: TextKind, num_rows: int) -> Arithmetic:
    """Two FLOPs for each weight and token: every layer for every token, the vocabulary head for
    sampled positions.
    """
    from benchmarks.make_mid_model import (
        HEAD_DIM,
        HEADS,
        HIDDEN,
        INTERMEDIATE,
        KV_HEADS,
        LAYERS,
        VOCAB,
    )

    attention = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM
    token = 2.0 * LAYERS * (attention + 3 * HIDDEN * INTERMEDIATE)
    head = 2.0 * HIDDEN * VOCAB
    prefill = (SHARED_TOKENS[work] + num_rows * OWN_TOKENS[work]) * token + num_rows * head
    decode = num_rows * (OUTPUT_TOKENS - 1) * (token + head) if work == "generate" else 0.0
    return Arithmetic(prefill=prefill, decode=decode)
