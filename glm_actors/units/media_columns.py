"""What prompts show, as Arrow columns: patches copied once on the way in, not at all on the way
out.

Owns the two columns `media` and `positions`. An item that several prompts of a table show, or one
prompt several times, is in it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from glm_batch.models.processing.patches import Media, MediaItem

# `patches` is null for an item that the table has before: one of the same kind, grid and digest.
MEDIA_TYPE = pa.list_(
    pa.struct(
        {
            "kind": pa.string(),
            "grid": pa.list_(pa.int32(), 3),
            "digest": pa.binary(),
            "patches": pa.large_binary(),
        }
    )
)

Key = tuple[str, tuple[int, int, int], bytes]
Bytes = npt.NDArray[np.uint8]


def media_columns(rows: Sequence[Media | None]) -> dict[str, pa.Array]:
    """`media`, of MEDIA_TYPE, and `positions`, list<int32>: [3, tokens] axis after axis. Null
    without media.
    """
    items = [item for media in rows if media is not None for item in media.items]
    fields = MEDIA_TYPE.value_type
    structs = pa.StructArray.from_arrays(
        [
            pa.array([item.kind for item in items], pa.string()),
            pa.array([item.grid_thw for item in items], fields.field("grid").type),
            pa.array([item.digest for item in items], pa.binary()),
            _patches_column(items),
        ],
        fields=list(fields),
    )
    positions = [
        np.empty(0, np.int64) if media is None else media.positions.ravel() for media in rows
    ]
    flat = pa.array(np.concatenate(positions).astype(np.int32))
    return {
        "media": _lists(
            rows, [0 if media is None else len(media.items) for media in rows], structs
        ),
        "positions": _lists(rows, [len(each) for each in positions], flat),
    }


def read_media(table: pa.Table) -> list[Media | None]:
    """What each row's prompt shows. Patches are read-only views into the table's memory, which they
    keep alive.

    Raises ValueError for a row whose patches stood in a row that the table has lost.
    """
    if "media" not in table.column_names:
        return [None] * table.num_rows
    known: dict[Key, MediaItem] = {}
    items = chain.from_iterable(_read_items(chunk, known) for chunk in table["media"].chunks)
    positions = chain.from_iterable(_read_positions(chunk) for chunk in table["positions"].chunks)
    return [
        None if shown is None or placed is None else Media(items=shown, positions=placed)
        for shown, placed in zip(items, positions, strict=True)
    ]


def _patches_column(items: Sequence[MediaItem]) -> pa.Array:
    seen: set[Key] = set()
    pieces: list[Bytes] = []
    repeated: list[bool] = []
    for item in items:
        repeated.append(item.key in seen)
        pieces.append(item.patches.reshape(-1)[: 0 if item.key in seen else None])
        seen.add(item.key)
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    data = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
    valid = pa.array([not again for again in repeated], pa.bool_()).buffers()[1]
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pieces), buffers)


def _lists(rows: Sequence[Media | None], lengths: Sequence[int], values: pa.Array) -> pa.ListArray:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"a unit of {offsets[-1]:,} media positions is too large: lower commit.unit_rows"
        )
    nulls = pa.array([media is None for media in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=nulls)


def _read_items(
    column: pa.ListArray, known: dict[Key, MediaItem]
) -> Iterator[tuple[MediaItem, ...] | None]:
    """The rows' items; those with patches are added to `known`, where others are found."""
    bounds, values = _bounds(column)
    kinds, digests = values.field("kind").to_pylist(), values.field("digest").to_pylist()
    grids = [tuple(grid) for grid in values.field("grid").to_pylist()]
    keys = list(zip(kinds, grids, digests, strict=True))
    patches = _views(values.field("patches"))
    for start_end in bounds:
        if start_end is None:
            yield None
            continue
        yield tuple(_item(keys[index], patches[index], known) for index in range(*start_end))


def _item(key: Key, data: Bytes | None, known: dict[Key, MediaItem]) -> MediaItem:
    if data is not None:
        kind, grid, digest = key
        patches = data.reshape(math.prod(grid), -1)
        known[key] = MediaItem(kind=kind, patches=patches, grid_thw=grid, digest=digest)  # type: ignore[arg-type]
    elif key not in known:
        raise ValueError(
            f"the patches of a row's {key[0]} of grid {key[1]} stood in an earlier row, which "
            "is gone"
        )
    return known[key]


def _read_positions(column: pa.ListArray) -> Iterator[npt.NDArray[np.int64] | None]:
    bounds, values = _bounds(column)
    flat = values.to_numpy().astype(np.int64)
    for start_end in bounds:
        yield None if start_end is None else flat[slice(*start_end)].reshape(3, -1)


def _bounds(column: pa.ListArray) -> tuple[list[tuple[int, int] | None], Any]:
    """Where each row's list lies in the values, None for a null; and the values, without those of
    rows sliced off.
    """
    offsets = column.offsets.to_numpy()
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    edges = (offsets - offsets[0]).tolist()
    valid = column.is_valid().to_pylist()
    return [(edges[i], edges[i + 1]) if valid[i] else None for i in range(len(column))], values


def _views(column: pa.LargeBinaryArray) -> list[Bytes | None]:
    """The values as views into the column's buffer."""
    _, offsets, data = column.buffers()
    valid = column.is_valid().to_pylist()
    if not any(valid):
        return [None] * len(column)
    edges = np.frombuffer(offsets, np.int64)[
        column.offset : column.offset + len(column) + 1
    ].tolist()
    flat = np.frombuffer(data, np.uint8)
    flat.flags.writeable = False  # the process that made the table could write
    return [flat[edges[i] : edges[i + 1]] if valid[i] else None for i in range(len(column))]
