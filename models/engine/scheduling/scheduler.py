"""Scheduler: which tokens of which sequences the next step computes. Integers in, decisions out, no
torch.

Policy: the oldest go first and are never sent back by younger ones, so that something always
finishes. Decodes come before prefill chunks; what is left of the step's tokens goes to prompts, cut
where the step is full. A prompt is admitted only when all of it fits into free blocks with one
spare block for each running sequence; when decodes outgrow the cache all the same, the youngest
running sequence gives its blocks back, waits and is recomputed (counted as a preemption). A prefix
computed in a step can be shared by sequences admitted in that very step.

Online sequences go before batch ones in all of this, as if they were older: they are scheduled and
admitted first, and batch ones are sent back when there is no room for them. A step takes batch
tokens up to `batch_step_tokens` in all, or up to a part of that beside online sequences, so that an
online request that comes meanwhile does not wait for long.
"""

from __future__ import annotations

import logging
from bisect import insort_left, insort_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from glm_batch.models.engine.api.request import BATCH, ONLINE, Priority
from glm_batch.models.engine.scheduling.block_manager import ROOT, BlockManager
from glm_batch.models.engine.scheduling.sequence import Sequence

# where one online sequence runs others may come: steps have this part of batch_step_tokens
BESIDE_ONLINE = 4
_PRIORITY = attrgetter("priority")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one sequence, to be computed in this step.

    The rest is what the sequence was before, for a step that has to be taken back: how many of its
    blocks were in the prefix index, under which number the last of them, and whether it was
    waiting.
    """

    sequence: Sequence
    start: int
    end: int
    num_registered: int
    contents: int
    was_waiting: bool


class Scheduler:
    """Waiting and running sequences and the blocks they hold."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_step_tokens: int,
        max_num_seqs: int,
        batch_step_tokens: int | None = None,
    ) -> None:
        """`batch_step_tokens` is None where batch steps need not be shorter than others."""
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.max_num_seqs = max_num_seqs
        self.batch_step_tokens = batch_step_tokens
        self.waiting: deque[Sequence] = deque()  # both: online first, then oldest first
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort_right(self.waiting, sequence, key=_PRIORITY)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; their blocks are allocated and their full blocks registered."""
        chunks: list[Chunk] = []
        used = 0
        for priority in (ONLINE, BATCH):
            budget = max(self._limit(priority) - used, 0)
            for chunk in self._scheduled(priority, budget, {chunk.sequence for chunk in chunks}):
                chunks.append(chunk)
                used += chunk.end - chunk.start
        return chunks

    def _limit(self, priority: Priority) -> int:
        """The most tokens of a step that has sequences of this priority."""
        if priority == ONLINE or self.batch_step_tokens is None:
            return self.max_step_tokens
        beside_online = bool(self.running) and self.running[0].priority == ONLINE
        share = (
            max(self.batch_step_tokens // BESIDE_ONLINE, 1)
            if beside_online
            else self.batch_step_tokens
        )
        return min(self.max_step_tokens, share)

    def _scheduled(
        self, priority: Priority, budget: int, scheduled: set[Sequence]
    ) -> Iterator[Chunk]:
        """The chunks of one priority. `scheduled` are the sequences that the step has already."""
        running = [sequence for sequence in self.running if sequence.priority == priority]
        decoding = [sequence for sequence in running if not sequence.is_prefilling]
        prefilling = [sequence for sequence in running if sequence.is_prefilling]
        for sequence in decoding + prefilling:
            count = min(sequence.num_owed, budget)
            if count and self._make_room(sequence, sequence.num_computed + count, scheduled):
                yield self._chunk(sequence, count)
                scheduled.add(sequence)
                budget -= count
        while budget and self.waiting and self.waiting[0].priority == priority:
            count = self._admit_first(budget)
            if not count:
                break
            sequence = self.waiting.popleft()
            insort_right(self.running, sequence, key=_PRIORITY)
            yield self._chunk(sequence, count, was_waiting=True)
            budget -= count

    def take_back(self, chunks: list[Chunk]) -> None:
        """Undoes a `schedule` whose step was not computed: nothing of it stays in the index, the
        admitted wait again.

        Running sequences keep their blocks: they will need them.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            self.blocks.unregister(
                sequence.block_table[chunk.num_registered : sequence.num_registered]
            )
            sequence.num_registered, sequence.contents = chunk.num_registered, chunk.contents
        for chunk in reversed(chunks):
            if chunk.was_waiting:
                self.running.remove(chunk.sequence)
                self._release(chunk.sequence)
                insort_left(self.waiting, chunk.sequence, key=_PRIORITY)

    def finish(self, sequence: Sequence) -> None:
        """Takes a running or waiting sequence out and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def shared_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Leading blocks within `num_tokens` that are worth attending to together with other
        sequences.

        Reference counts never grow along a block table, so the last block held by at least half as
        many sequences as the first one is found by bisection.
        """
        high = num_tokens // self.blocks.block_size
        if not high:
            return 0
        table = sequence.block_table
        enough = max(2, self.blocks.ref_count(table[0]) // 2)
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks.ref_count(table[middle - 1]) >= enough:
                low = middle
            else:
                high = middle - 1
        return low

    def _make_room(self, sequence: Sequence, num_tokens: int, scheduled: set[Sequence]) -> bool:
        """Gives blocks for `num_tokens`, sending back the youngest unscheduled sequences."""
        if sequence not in self.running:  # sent back for an older one in this very step
            return False
        missing = self.blocks.num_blocks_for(num_tokens) - len(sequence.block_table)
        while missing > self.blocks.num_free:
            victim = next(other for other in reversed(self.running) if other not in scheduled)
            self._send_back(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_table += self.blocks.allocate(missing)
        return True

    def _send_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort_left(self.waiting, sequence, key=_PRIORITY)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_registered = 0
        sequence.contents = ROOT

    def _admit_first(self, budget: int) -> int:
        """Admits the sequence that waits first, an online one in the place of batch ones."""
        sequence = self.waiting[0]
        while True:
            count = self._admit(sequence, budget) if len(self.running) < self.max_num_seqs else 0
            if count or not self.running or self.running[-1].priority <= sequence.priority:
                return count
            self._send_back(self.running[-1])

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Reserves blocks for a whole sequence; the tokens to compute now, 0 without room."""
        blocks = self.blocks
        hits = (
            blocks.find_prefix(sequence.prompt_keys, sequence.answer.num_skippable)
            if blocks.prefix_caching
            else []
        )
        missing = blocks.num_blocks_for(sequence.num_tokens) - len(hits)
        spare = len(self.running)
        if missing + spare > blocks.num_free - blocks.num_unheld(hits):
            return 0
        blocks.hold(hits)
        sequence.block_table = hits + blocks.allocate(missing)
        sequence.num_computed = len(hits) * blocks.block_size
        sequence.num_registered = len(hits)
        sequence.contents = blocks.contents(hits[-1]) if hits else ROOT
        if not sequence.num_preemptions:
            sequence.cached_tokens = sequence.num_computed
        return min(sequence.num_owed, budget)

    def _chunk(self, sequence: Sequence, count: int, *, was_waiting: bool = False) -> Chunk:
        """Registers the blocks that the chunk fills: whoever is scheduled later in this step may
        already share them.

        That is safe because a layer writes the keys and values of all tokens of a step before it
        attends.
        """
        start, end = sequence.num_computed, sequence.num_computed + count
        chunk = Chunk(sequence, start, end, sequence.num_registered, sequence.contents, was_waiting)
        size = self.blocks.block_size
        if self.blocks.prefix_caching:
            for i in range(sequence.num_registered, min(end, sequence.num_shareable) // size):
                keys = sequence.keys(i * size, (i + 1) * size)
                sequence.contents = self.blocks.register(
                    sequence.block_table[i], sequence.contents, keys
                )
                sequence.num_registered = i + 1
        return chunk


# How torch and its libraries put it; torch.OutOfMemoryError is a RuntimeError with the first of
# these.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "_status_alloc_failed",
)
STEPS_TO_RECOVER = 64  # that must succeed before twice as many tokens are tried
MAX_STEPS_TO_RECOVER = 1024

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of memory, on whatever device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)


class StepSize:
    """`tokens` is the limit of the next step, at most `most`."""

    def __init__(self, most: int) -> None:
        self.tokens = most
        self.num_failures = 0
        self._most = most
        self._fitted = most  # the limit under which a step last succeeded
        self._successes = 0
        self._patience = STEPS_TO_RECOVER

    def succeeded(self) -> None:
        """After enough steps the limit doubles; a doubled one that fails makes that rarer."""
        self._fitted = self.tokens
        if self.tokens == self._most:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self._successes = 0
            self.tokens = min(2 * self.tokens, self._most)

    def failed(self, num_tokens: int, reason: str) -> bool:
        """A step of so many tokens did not fit; False when there is no smaller one to try."""
        self.num_failures += 1
        self._successes = 0
        if num_tokens <= 1:
            # one row was too large by itself: the others need not pay for it
            self.tokens = self._fitted
            return False
        if self.tokens > self._fitted:
            self._patience = min(2 * self._patience, MAX_STEPS_TO_RECOVER)
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        log.warning(
            "out of memory in a step of %d tokens; next: %d tokens. %s",
            num_tokens,
            self.tokens,
            reason,
        )
        return True
