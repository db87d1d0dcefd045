"""From scheduled chunks to one packed step: plain numpy arrays that any rank can turn into tensors.

Owns how tokens are packed, which of them attend together (shared prefixes once, short queries
padded side by side, long ones cut into blocks) and which rows' results are wanted. Pure functions
of their arguments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Embed,
    Generate,
    Inspect,
    Score,
    Tag,
)
from glm_batch.models.engine.scheduling.placeholders import Span
from glm_batch.models.engine.scheduling.scheduler import Chunk, Scheduler
from glm_batch.models.engine.scheduling.sequence import Sequence

Ints = NDArray[np.int64]
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
    hidden: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """models.network.layers.attention.AttentionGroup in numpy."""

    prefix_slots: Ints
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Wanted rows after which tokens[i] stands: its log-probability, and those of the likeliest
    `top` of `num_ids` ids.

    rows, tokens: [R].
    """

    rows: Ints
    tokens: Ints
    top: int
    num_ids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. input_ids, slots: [tokens]; out_rows [W]: the packed rows whose hidden state is
    wanted.

    positions: [tokens], or [3, tokens] where media are among them. media: what takes the place of
    embeddings, with tokens counted as packed rows.

    groups, out_groups: who attends to what, in the form that the runner's attention reads;
    out_groups for the wanted rows alone, and groups itself where all are wanted.

    The rest says what becomes of the W wanted rows, each an index into them: `sample_rows` give
    logits to sample from, `class_rows` class logits, `logit_rows` and `hidden_rows` everything;
    pairs (score_rows[pair_rows[i]], pair_tokens[i]) give one log-probability each; `ranking` gives
    those of whole prompts.
    """

    input_ids: Ints
    positions: Ints
    slots: Ints
    groups: Layout
    out_rows: Ints
    out_groups: Layout
    sample_rows: Ints
    score_rows: Ints
    pair_rows: Ints
    pair_tokens: Ints
    class_rows: Ints
    logit_rows: Ints
    hidden_rows: Ints
    ranking: Ranking | None = None
    media: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one sequence gets back from a step: `indices` are its tokens, in the order of their
    rows.
    """

    sequence: Sequence
    indices: list[int]


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries of one sequence: `rows` where they stand, `indices` which tokens of the sequence they
    are.
    """

    sequence: Sequence
    rows: Ints
    indices: Ints
    slots: Ints  # of tokens [0, last index + 1)


def build_batch(
    chunks: list[Chunk], scheduler: Scheduler, *, num_heads: int, eos_token_ids: tuple[int, ...]
) -> tuple[Batch, list[Wanted]]:
    """Packs the chunks of one step. `num_heads` bounds the size of an attention part."""
    block_size = scheduler.blocks.block_size
    segments = list(_segments(chunks, block_size))
    wanted = [
        Wanted(chunk.sequence, chunk.sequence.wanted(chunk.start, chunk.end)) for chunk in chunks
    ]
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
        **outputs(wanted, eos_token_ids),
    )
    return batch, wanted


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
    """Sequences that share their last shared block share everything before it: they become one
    group.
    """
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
    """Long segments become parts of their own, short ones stand side by side with others of similar
    length.
    """
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
    """Whether one more may join: padding may cost a quarter (or 64 keys), and the scores must stay
    small.
    """
    first, now = len(bunch[0].slots) - prefix_len, num_keys - prefix_len
    scores = (len(bunch) + 1) * num_queries * num_heads * num_keys
    return now <= max(first * 5 // 4, first + 64) and scores <= MAX_SCORES


def _pieces(segment: Segment, prefix_len: int, num_heads: int) -> Iterator[Segment]:
    """Cuts many queries over a long context, each piece with the context that its last query sees."""
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
        hidden=~_visible(segment, prefix_len)[None],
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
    return Part(rows=rows, keep=keep, own_slots=own_slots, hidden=~visible)


def _visible(segment: Segment, prefix_len: int) -> NDArray[np.bool_]:
    """[queries, own keys]: a token sees itself and what is before it; a tree's node only its own
    ancestors there.
    """
    sequence = segment.sequence
    keys = np.arange(prefix_len, len(segment.slots), dtype=np.int64)
    visible: NDArray[np.bool_] = keys <= segment.indices[:, None]
    if sequence.tree is not None and len(segment.slots) > sequence.num_prompt:
        nodes = segment.indices - sequence.num_prompt
        first = max(sequence.num_prompt - prefix_len, 0)
        known = len(segment.slots) - sequence.num_prompt
        visible[nodes >= 0, first:] = sequence.tree.ancestors[nodes[nodes >= 0], :known]
    return visible


def outputs(wanted: list[Wanted], eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a Batch that say what becomes of its wanted rows."""
    found: dict[str, list[int]] = {
        name: []
        for name in (
            "sample_rows",
            "score_rows",
            "pair_rows",
            "pair_tokens",
            "class_rows",
            "logit_rows",
            "hidden_rows",
        )
    }
    row = 0
    for want in wanted:
        rows = range(row, row + len(want.indices))
        match want.sequence.request.work:
            case Generate():
                found["sample_rows"] += rows
            case Choose():
                for index, out_row in zip(want.indices, rows, strict=True):
                    tokens = scored_tokens(want.sequence, index, eos_token_ids)
                    found["pair_rows"] += [len(found["score_rows"])] * len(tokens)
                    found["pair_tokens"] += tokens
                    found["score_rows"].append(out_row)
            case Classify() | Tag():
                found["class_rows"] += rows
            case Inspect(what="logits"):
                found["logit_rows"] += rows
            case Embed() | Inspect():
                found["hidden_rows"] += rows
            case Score():
                pass  # see `ranking`
        row += len(want.indices)
    return {name: np.array(values, dtype=np.int64) for name, values in found.items()}


def ranking(wanted: list[Wanted], num_ids: int) -> Ranking | None:
    """The rows of sequences whose prompts are scored; `top` is what the most curious of them asks
    for.
    """
    rows: list[int] = []
    tokens: list[int] = []
    top = row = 0
    for want in wanted:
        if isinstance(want.sequence.request.work, Score):
            rows += range(row, row + len(want.indices))
            tokens += [want.sequence.tokens[index + 1] for index in want.indices]
            top = max(top, want.sequence.request.work.top)
        row += len(want.indices)
    if not rows:
        return None
    return Ranking(
        rows=np.array(rows, dtype=np.int64),
        tokens=np.array(tokens, dtype=np.int64),
        top=top,
        num_ids=num_ids,
    )


def scored_tokens(sequence: Sequence, index: int, eos_token_ids: tuple[int, ...]) -> list[int]:
    """The tokens whose probability after token `index` some label needs: edges first, then the end
    ids.
    """
    assert sequence.tree is not None
    node = index - sequence.num_prompt
    edges = [sequence.tree.edges[edge][1] for edge in sequence.tree.edges_at[node]]
    return edges + (list(eos_token_ids) if node in sequence.tree.ends else [])
