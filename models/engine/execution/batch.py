"""From scheduled chunks to one packed step: plain numpy arrays that any rank can turn into tensors.

Here is decided which tokens attend together: shared prefixes once, short queries padded side by
side, long ones cut into pieces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.scheduling.placeholders import Span
from glm_batch.models.engine.scheduling.scheduler import Chunk, Scheduler
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.readout import Ints, Readout, ReadoutBuilder, Wanted

Layout = Any  # tuple[Group, ...], or glm_batch.models.engine.cuda.batch_paged.PagedLayout
SHORT_QUERIES = 16  # up to this many queries a sequence is padded together with others
# Scores of one part (all heads). Near the caches, and small enough for memory that the allocator
# keeps: with twice as many, prompts of 500 tokens and more took 1.4 to 2 times as long on a CPU,
# probably by page faults.
MAX_SCORES = 1 << 21
MIN_QUERIES = 16  # however long the context, a part has at least this many queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """models.network.layers.attention.AttentionPart in numpy."""

    rows: Ints
    keep: Ints | None
    own_slots: Ints
    masked: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """models.network.layers.attention.AttentionGroup in numpy."""

    prefix_slots: Ints
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step, as a runner computes it. input_ids, slots: [tokens]; out_rows [W]: the packed rows
    whose hidden state is wanted; readout: what is read off them.

    positions: [tokens], or [3, tokens] where media are among them. media: what takes the place of
    embeddings, with tokens counted as packed rows.

    groups, out_groups: who attends to what, in the form that the runner's attention reads;
    out_groups for the wanted rows alone, and groups itself where all are wanted.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    groups: Layout
    out_rows: Ints
    out_groups: Layout
    readout: Readout
    media: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A batch, the Wanted of each chunk, and the decodings in the order of the rows to sample."""

    batch: Batch
    wanted: list[Wanted]
    decodings: list[Decoding]


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries of one sequence: `rows` of the batch, which are the sequence's tokens `indices`."""

    sequence: Sequence
    rows: Ints
    indices: Ints
    slots: Ints  # of tokens [0, last index + 1)


def build_step(chunks: list[Chunk], scheduler: Scheduler, *, num_heads: int, num_ids: int) -> Step:
    """`num_heads` bounds the size of a part; `num_ids`: ids that stand for something."""
    block_size = scheduler.blocks.block_size
    segments = list(_segments(chunks, block_size))
    readout = ReadoutBuilder()
    wanted = read_chunks(chunks, readout)
    wanted_segments, out_rows = _wanted_segments(segments, wanted)
    num_tokens = sum(len(segment.rows) for segment in segments)
    shared = [scheduler.shared_blocks(chunk.sequence, chunk.start) for chunk in chunks]
    groups = _groups(segments, shared, block_size, num_heads)
    all_wanted = len(out_rows) == num_tokens
    batch = Batch(
        input_ids=np.concatenate(
            [
                np.array(chunk.sequence.tokens[chunk.start : chunk.end], dtype=np.int64)
                for chunk in chunks
            ]
        ),
        positions=_positions(chunks),
        slots=np.concatenate([segment.slots[segment.indices] for segment in segments]),
        groups=groups,
        out_rows=out_rows,
        out_groups=groups
        if all_wanted
        else _groups(wanted_segments, shared, block_size, num_heads),
        media=tuple(media_spans(chunks)),
        readout=readout.readout(num_ids),
    )
    return Step(batch, wanted, readout.decodings)


def read_chunks(chunks: list[Chunk], readout: ReadoutBuilder) -> list[Wanted]:
    """Asks each chunk's answer what it wants; the wanted rows stand in the order of the chunks."""
    wanted, row = [], 0
    for chunk in chunks:
        sequence = chunk.sequence
        indices = sequence.answer.wanted(sequence, chunk.start, chunk.end)
        rows = range(row, row + len(indices))
        where = sequence.answer.read(sequence, indices, rows, readout)
        wanted.append(Wanted(sequence, indices, where))
        row = rows.stop
    return wanted


def _positions(chunks: list[Chunk]) -> Ints:
    """One axis for all while nobody needs three: text stands at the same place on each of them."""
    found = [chunk.sequence.positions(chunk.start, chunk.end) for chunk in chunks]
    if any(positions.ndim == 2 for positions in found):
        found = [np.broadcast_to(positions, (3, positions.shape[-1])) for positions in found]
    return np.concatenate(found, axis=-1)


def media_spans(chunks: list[Chunk]) -> Iterator[Span]:
    """The spans, cut where their chunks end."""
    row = 0
    for chunk in chunks:
        for span in chunk.sequence.media.spans if chunk.sequence.media else ():
            here = span.cut(chunk.start, chunk.end)
            if here:
                shift = row - chunk.start
                yield Span(here.item, here.start + shift, here.end + shift, here.first)
        row += chunk.end - chunk.start


def _segments(chunks: list[Chunk], block_size: int) -> Iterator[Segment]:
    row = 0
    within = np.arange(block_size, dtype=np.int64)
    for chunk in chunks:
        count = chunk.end - chunk.start
        table = np.array(chunk.sequence.block_table, dtype=np.int64)
        slots = (table[:, None] * block_size + within).ravel()[: chunk.end]
        indices = np.arange(chunk.start, chunk.end, dtype=np.int64)
        yield Segment(chunk.sequence, np.arange(row, row + count, dtype=np.int64), indices, slots)
        row += count


def _wanted_segments(segments: list[Segment], wanted: list[Wanted]) -> tuple[list[Segment], Ints]:
    """The same segments with the wanted queries alone, rows counted among the wanted ones."""
    found, out_rows, row = [], [], 0
    for segment, want in zip(segments, wanted, strict=True):
        indices = np.array(want.indices, dtype=np.int64)
        found.append(
            Segment(
                segment.sequence,
                np.arange(row, row + len(indices), dtype=np.int64),
                indices,
                segment.slots,
            )
        )
        out_rows.append(segment.rows[indices - segment.indices[0]])
        row += len(indices)
    return found, np.concatenate(out_rows)


def _groups(
    segments: list[Segment], shared: list[int], block_size: int, num_heads: int
) -> tuple[Group, ...]:
    """Sequences with the same last shared block share all before it: they become one group."""
    members: dict[int | None, list[tuple[Segment, int]]] = defaultdict(list)
    for segment, num_shared in zip(segments, shared, strict=True):
        if len(segment.rows):
            key = segment.sequence.block_table[num_shared - 1] if num_shared else None
            members[key].append((segment, num_shared * block_size))
    alone = members.pop(None, [])
    groups = []
    for group in members.values():
        if len(group) == 1:
            alone.append((group[0][0], 0))
        else:
            prefix_len = group[0][1]
            prefix_slots = group[0][0].slots[:prefix_len]
            parts = tuple(_parts([segment for segment, _ in group], prefix_len, num_heads))
            groups.append(Group(prefix_slots=prefix_slots, parts=parts))
    if alone:
        parts = tuple(_parts([segment for segment, _ in alone], 0, num_heads))
        groups.append(Group(prefix_slots=np.empty(0, dtype=np.int64), parts=parts))
    return tuple(groups)


def _parts(segments: list[Segment], prefix_len: int, num_heads: int) -> Iterator[Part]:
    """Long segments become parts of their own, short ones stand beside others of similar length."""
    short = []
    for segment in segments:
        if len(segment.rows) <= SHORT_QUERIES:
            short.append(segment)
        else:
            for piece in _pieces(segment, prefix_len, num_heads):
                yield _single(piece, prefix_len)
    short.sort(key=lambda segment: len(segment.slots))
    bunch: list[Segment] = []
    num_queries = 0
    for segment in short:
        num_queries = max(num_queries, len(segment.rows))
        if bunch and not _fits(bunch, num_queries, len(segment.slots), prefix_len, num_heads):
            yield _padded(bunch, prefix_len)
            bunch, num_queries = [], len(segment.rows)
        bunch.append(segment)
    if bunch:
        yield _padded(bunch, prefix_len)


def _fits(
    bunch: list[Segment], num_queries: int, num_keys: int, prefix_len: int, num_heads: int
) -> bool:
    """Whether one more may join: padding costs at most a quarter or 64 keys, scores stay small."""
    first, now = len(bunch[0].slots) - prefix_len, num_keys - prefix_len
    scores = (len(bunch) + 1) * num_queries * num_heads * num_keys
    return now <= max(first * 5 // 4, first + 64) and scores <= MAX_SCORES


def _pieces(segment: Segment, prefix_len: int, num_heads: int) -> Iterator[Segment]:
    """Cuts many queries over a long context, each piece with what its last query sees."""
    count = max(MIN_QUERIES, MAX_SCORES // (num_heads * len(segment.slots)))
    for start in range(0, len(segment.rows), count):
        indices = segment.indices[start : start + count]
        yield Segment(
            segment.sequence,
            segment.rows[start : start + count],
            indices,
            segment.slots[: indices[-1] + 1],
        )


def _single(segment: Segment, prefix_len: int) -> Part:
    return Part(
        rows=segment.rows[None],
        keep=None,
        own_slots=segment.slots[None, prefix_len:],
        masked=~_visible(segment, prefix_len)[None],
    )


def _padded(segments: list[Segment], prefix_len: int) -> Part:
    num_queries = max(len(segment.rows) for segment in segments)
    own_len = max(len(segment.slots) for segment in segments) - prefix_len
    rows = np.empty((len(segments), num_queries), dtype=np.int64)
    own_slots = np.zeros((len(segments), own_len), dtype=np.int64)
    visible = np.zeros((len(segments), num_queries, own_len), dtype=np.bool_)
    visible[:, :, 0] = True  # what padding queries see
    for r, segment in enumerate(segments):
        count, keys = len(segment.rows), len(segment.slots) - prefix_len
        rows[r, :count], rows[r, count:] = segment.rows, segment.rows[0]
        own_slots[r, :keys] = segment.slots[prefix_len:]
        visible[r, :count, :keys] = _visible(segment, prefix_len)
    counts = np.array([len(segment.rows) for segment in segments])
    real = np.arange(num_queries) < counts[:, None]
    keep = None if real.all() else np.flatnonzero(real)
    return Part(rows=rows, keep=keep, own_slots=own_slots, masked=~visible)


def _visible(segment: Segment, prefix_len: int) -> NDArray[np.bool_]:
    """[queries, own keys]: a token sees what is before it; a tree's node only its own ancestors."""
    sequence = segment.sequence
    keys = np.arange(prefix_len, len(segment.slots), dtype=np.int64)
    visible: NDArray[np.bool_] = keys <= segment.indices[:, None]
    if sequence.tree is not None and len(segment.slots) > sequence.num_prompt:
        nodes = segment.indices - sequence.num_prompt
        first = max(sequence.num_prompt - prefix_len, 0)
        known = len(segment.slots) - sequence.num_prompt
        visible[nodes >= 0, first:] = sequence.tree.ancestors[nodes[nodes >= 0], :known]
    return visible
