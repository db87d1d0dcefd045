"""Write the shipped evaluation shards, examples/{support,shapes,clips}/*: `python
examples/make_shards.py`.

Owns the columns, the file names and which rows are bad. Tickets come from the sentences that no
model was trained on, pictures and clips from random streams of their own. Gold is null where a row
must end as an error. support: id, text, gold_label, gold_order (a JSON string), gold_reply. shapes:
id, image, gold_shape, gold_colour, gold_count. clips: id, video, gold_motion.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from media_files import (
    BROKEN_CLIPS,
    BROKEN_IMAGES,
    broken_clip,
    broken_image,
    encode_clip,
    encode_image,
)
from PIL import Image
from sentences import EVAL
from shapes import Clip, Scene, clips, draw, scenes
from world import Ticket, tickets, with_control_strings

Row = dict[str, str | None]
MediaRow = dict[str, str | bytes | None]

HERE = Path(__file__).parent
FOLDER = HERE / "support"
SEED = 2024
PARQUET_ROWS = (600, 600, 400)
JSONL_ROWS = (400, 400)
NUM_NULL, NUM_OVERLONG, NUM_EMPTY, NUM_CONTROL = 12, 8, 6, 30
OVERLONG_CHARS = 14_000  # more tokens than the tiny checkpoint has positions
IMAGE_ROWS = (160, 160, 160)
CLIP_ROWS = (80, 80)
NUM_BROKEN_IMAGES, NUM_BROKEN_CLIPS = 2, 1  # of each kind


def _schema(*columns: str, media: str | None = None) -> pa.Schema:
    fields = [pa.field("id", pa.string(), nullable=False)]
    fields += [pa.field(media, pa.binary())] if media else []
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in columns)])


SCHEMA = _schema("text", "gold_label", "gold_order", "gold_reply")
IMAGE_SCHEMA = _schema("gold_shape", "gold_colour", "gold_count", media="image")
CLIP_SCHEMA = _schema("gold_motion", media="video")


def make_rows(num_rows: int, seed: int) -> list[Row]:
    """All tickets in file order, the bad ones scattered among them."""
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


def make_image_rows(num_rows: int, seed: int) -> Iterator[MediaRow]:
    """All pictures in file order, the broken ones scattered among them."""
    rng = random.Random(f"images {seed}")
    kinds = _scattered(num_rows, NUM_BROKEN_IMAGES * BROKEN_IMAGES, rng)
    for number, (kind, scene) in enumerate(zip(kinds, scenes("eval", seed), strict=False), start=1):
        image = encode_image(draw(scene), rng) if kind is None else broken_image(kind, draw(scene))
        yield {"id": f"S{number:05d}", "image": image, **(_golds(scene) if kind is None else {})}


def make_clip_rows(num_rows: int, seed: int) -> Iterator[MediaRow]:
    """All clips in file order, the broken ones scattered among them."""
    rng = random.Random(f"clips {seed}")
    kinds = _scattered(num_rows, NUM_BROKEN_CLIPS * BROKEN_CLIPS, rng)
    for number, (kind, clip) in enumerate(zip(kinds, clips("eval", seed), strict=False), start=1):
        video = _encoded(clip, rng) if kind is None else broken_clip(kind, _frames(clip), clip.fps)
        yield {
            "id": f"C{number:05d}",
            "video": video,
            "gold_motion": clip.motion if kind is None else None,
        }


def write_shards(folder: Path, seed: int = SEED) -> list[Path]:
    """Write every shard of tickets and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"tickets-{number}.parquet" for number in range(1, len(PARQUET_ROWS) + 1)]
    names += [
        f"tickets-{number}.jsonl"
        for number in range(len(names) + 1, len(names) + len(JSONL_ROWS) + 1)
    ]
    sizes = PARQUET_ROWS + JSONL_ROWS
    rows = iter(make_rows(sum(sizes), seed))
    paths = [folder / name for name in names]
    for path, size in zip(paths, sizes, strict=True):
        part = list(itertools.islice(rows, size))
        if path.suffix == ".parquet":
            table = pa.Table.from_pylist(part, schema=SCHEMA)
            pq.write_table(table, path, compression="zstd", row_group_size=200)
        else:
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part),
                encoding="utf-8",
            )
    return paths


def write_media_shards(folder: Path, seed: int = SEED) -> list[Path]:
    """Write every shard of pictures and clips below `folder` and return the paths."""
    images, videos = make_image_rows(sum(IMAGE_ROWS), seed), make_clip_rows(sum(CLIP_ROWS), seed)
    paths = _write_parquet(folder / "shapes", "shapes", images, IMAGE_ROWS, IMAGE_SCHEMA)
    return paths + _write_parquet(folder / "clips", "clips", videos, CLIP_ROWS, CLIP_SCHEMA)


def _write_parquet(
    folder: Path, name: str, rows: Iterator[MediaRow], sizes: Sequence[int], schema: pa.Schema
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{number}.parquet" for number in range(1, len(sizes) + 1)]
    for path, size in zip(paths, sizes, strict=True):
        table = pa.Table.from_pylist(list(itertools.islice(rows, size)), schema=schema)
        # the files are compressed already
        pq.write_table(table, path, compression="none", row_group_size=40)
    return paths


def _scattered(num_rows: int, kinds: Sequence[str], rng: random.Random) -> list[str | None]:
    """One entry a row: how it is broken, or None."""
    entries = [*kinds, *[None] * (num_rows - len(kinds))]
    rng.shuffle(entries)
    return entries


def _golds(scene: Scene) -> MediaRow:
    return {"gold_shape": scene.shape, "gold_colour": scene.colour, "gold_count": str(scene.count)}


def _frames(clip: Clip) -> list[Image.Image]:
    return clip.draw(list(range(clip.num_frames)))


def _encoded(clip: Clip, rng: random.Random) -> bytes:
    return encode_clip(_frames(clip), clip.fps, index_first=rng.random() < 0.5)


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
    for path in write_shards(FOLDER) + write_media_shards(HERE):
        print(path, path.stat().st_size)
