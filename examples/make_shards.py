"""Write the shipped evaluation shards, examples/support/*.parquet and *.jsonl: `python examples/make_shards.py`.

Owns the columns, the file names and which rows are bad. Tickets come from the sentences that no model was trained on.
Columns: id, text, gold_label, gold_order (a JSON string), gold_reply. Gold is null where a row must end as an error.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentences import EVAL
from world import Ticket, tickets, with_control_strings

Row = dict[str, str | None]

FOLDER = Path(__file__).parent / "support"
SEED = 2024
PARQUET_ROWS = (600, 600, 400)
JSONL_ROWS = (400, 400)
NUM_NULL, NUM_OVERLONG, NUM_EMPTY, NUM_CONTROL = 12, 8, 6, 30
OVERLONG_CHARS = 14_000  # more tokens than the tiny checkpoint has positions
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("text", "gold_label", "gold_order", "gold_reply")),
    ]
)


def make_rows(num_rows: int, seed: int) -> list[Row]:
    """All rows in file order, the bad ones scattered among them."""
    rng = random.Random(seed)
    stream = tickets(EVAL, seed)
    rows = [{"text": None} for _ in range(NUM_NULL)]
    rows += [{"text": _overlong_text(next(stream))} for _ in range(NUM_OVERLONG)]
    rows += [{"text": rng.choice(("", " ", "\n"))} for _ in range(NUM_EMPTY)]
    rows += [_labelled(with_control_strings(next(stream), rng)) for _ in range(NUM_CONTROL)]
    rows += [_labelled(ticket) for ticket in itertools.islice(stream, num_rows - len(rows))]
    rng.shuffle(rows)
    return [
        {name: f"T{number:05d}" if name == "id" else row.get(name) for name in SCHEMA.names}
        for number, row in enumerate(rows, start=1)
    ]


def write_shards(folder: Path, seed: int = SEED) -> list[Path]:
    """Write every shard and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"tickets-{number}.parquet" for number in range(1, len(PARQUET_ROWS) + 1)]
    names += [f"tickets-{number}.jsonl" for number in range(len(names) + 1, len(names) + len(JSONL_ROWS) + 1)]
    sizes = PARQUET_ROWS + JSONL_ROWS
    rows = iter(make_rows(sum(sizes), seed))
    paths = [folder / name for name in names]
    for path, size in zip(paths, sizes, strict=True):
        part = list(itertools.islice(rows, size))
        if path.suffix == ".parquet":
            table = pa.Table.from_pylist(part, schema=SCHEMA)
            pq.write_table(table, path, compression="zstd", row_group_size=200)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    return paths


def _labelled(ticket: Ticket) -> Row:
    return {
        "text": ticket.text,
        "gold_label": ticket.label,
        "gold_order": ticket.order_json,
        "gold_reply": ticket.reply,
    }


def _overlong_text(ticket: Ticket) -> str:
    repeats = OVERLONG_CHARS // len(ticket.text) + 1
    return "\n".join(f"> {ticket.text}" for _ in range(repeats))


if __name__ == "__main__":
    for path in write_shards(FOLDER):
        print(path, path.stat().st_size)
