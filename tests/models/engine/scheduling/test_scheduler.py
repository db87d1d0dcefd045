"""Scheduling policy by tables and random loads: all finishes, nothing leaks, the old never wait for
the young.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from glm_batch.models.engine.api.request import (
    BATCH,
    ONLINE,
    Generate,
    Priority,
    Request,
    SamplingParams,
)
from glm_batch.models.engine.scheduling.block_manager import BlockManager
from glm_batch.models.engine.scheduling.scheduler import Chunk, Scheduler
from glm_batch.models.engine.scheduling.sequence import Sequence

SIZE = 4


def make_sequence(name: str, prompt: list[int], priority: Priority = ONLINE) -> Sequence:
    request = Request(
        id=name, input_ids=prompt, work=Generate(sampling=SamplingParams()), priority=priority
    )
    answer: Any = SimpleNamespace(num_skippable=len(prompt) - 1)
    return Sequence(request=request, answer=answer, tokens=list(prompt), num_prompt=len(prompt))


def make_scheduler(
    num_blocks: int, *, step: int = 16, seqs: int = 8, batch_step: int | None = None
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, SIZE),
        max_step_tokens=step,
        max_num_seqs=seqs,
        batch_step_tokens=batch_step,
    )


def compute(chunks: list[Chunk], token: int = 9) -> None:
    """What the engine does after a step: count the tokens as computed, append a sampled one to
    complete sequences.
    """
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.end
        if not chunk.sequence.num_owed:
            chunk.sequence.tokens.append(token)


def spans(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.end) for chunk in chunks]


def test_prompts_fill_the_step_and_are_cut_at_its_end() -> None:
    scheduler = make_scheduler(32, step=10)
    for name, first in (("a", 0), ("b", 100)):
        scheduler.add(make_sequence(name, list(range(first, first + 8))))
    first = scheduler.schedule()
    assert spans(first) == [("a", 0, 8), ("b", 0, 2)]
    compute(first)
    # a decode and a prefill chunk in one step
    assert spans(scheduler.schedule()) == [("a", 8, 9), ("b", 2, 8)]


def test_a_prefix_is_shared_within_the_step_that_computes_it() -> None:
    scheduler = make_scheduler(32, step=64)
    for name in "abc":
        scheduler.add(make_sequence(name, [1, 2, 3, 4, 5, 6, 7, 8, ord(name)]))
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 0, 9), ("b", 8, 9), ("c", 8, 9)]
    tables = [chunk.sequence.block_table for chunk in chunks]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert scheduler.shared_blocks(chunks[1].sequence, 8) == 2


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler(32)
    for name in "ab":
        scheduler.add(make_sequence(name, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert spans(scheduler.schedule()) == [("a", 0, 8), ("b", 4, 8)]


def test_the_youngest_is_sent_back_when_decodes_outgrow_the_cache() -> None:
    scheduler = make_scheduler(5, step=32)
    for name, first in (("a", 0), ("b", 50)):
        scheduler.add(make_sequence(name, list(range(first, first + 7))))
    chunks = scheduler.schedule()
    assert [chunk.sequence.request.id for chunk in chunks] == ["a", "b"]
    sent_back = None
    for _ in range(8):
        compute(chunks)
        chunks = scheduler.schedule()
        scheduler.blocks.check()
        if scheduler.num_preemptions:
            sent_back = scheduler.waiting[0]
            break
    assert sent_back is not None
    assert sent_back.request.id == "b"
    assert sent_back.block_table == []
    assert [chunk.sequence.request.id for chunk in chunks] == ["a"]


def test_a_prompt_that_does_not_fit_yet_waits_without_holding_anything() -> None:
    scheduler = make_scheduler(4, step=64)
    scheduler.add(make_sequence("a", list(range(12))))
    scheduler.add(make_sequence("b", list(range(50, 58))))
    assert spans(scheduler.schedule()) == [("a", 0, 12)]
    assert scheduler.waiting[0].block_table == []


def test_online_requests_go_before_batch_ones_that_came_earlier() -> None:
    scheduler = make_scheduler(64, step=10)
    scheduler.add(make_sequence("batch", list(range(16)), BATCH))
    compute(scheduler.schedule())
    scheduler.add(make_sequence("more batch", list(range(50, 58)), BATCH))
    scheduler.add(make_sequence("online", list(range(100, 104))))
    first = scheduler.schedule()
    assert spans(first) == [("online", 0, 4), ("batch", 10, 16)]
    compute(first)
    assert spans(scheduler.schedule()) == [
        ("online", 4, 5),
        ("batch", 16, 17),
        ("more batch", 0, 8),
    ]


def test_a_step_takes_batch_tokens_up_to_its_limit_and_fewer_beside_online_ones() -> None:
    scheduler = make_scheduler(64, step=32, batch_step=12)
    scheduler.add(make_sequence("batch", list(range(40)), BATCH))
    first = scheduler.schedule()
    assert spans(first) == [("batch", 0, 12)]
    compute(first)
    scheduler.add(make_sequence("online", list(range(100, 110))))
    second = scheduler.schedule()
    # more than the limit by itself: nothing is left for the batch
    assert spans(second) == [("online", 0, 10)]
    compute(second)
    third = scheduler.schedule()
    assert spans(third) == [("online", 10, 11), ("batch", 12, 14)]  # a quarter of 12 in all
    compute(third)
    scheduler.finish(third[0].sequence)
    assert spans(scheduler.schedule()) == [("batch", 14, 26)]


def test_batch_sequences_make_room_for_an_online_one_and_are_finished_later() -> None:
    scheduler = make_scheduler(9, step=32)
    for name, first in (("old batch", 0), ("young batch", 50)):
        scheduler.add(make_sequence(name, list(range(first, first + 12)), BATCH))
    compute(scheduler.schedule())
    scheduler.add(make_sequence("online", list(range(100, 112))))
    chunks = scheduler.schedule()
    scheduler.blocks.check()
    assert spans(chunks)[0] == ("online", 0, 12)
    assert [sequence.request.id for sequence in scheduler.waiting] == ["young batch"]
    assert scheduler.num_preemptions == 1
    compute(chunks)
    scheduler.finish(chunks[0].sequence)
    compute(scheduler.schedule())
    assert [sequence.request.id for sequence in scheduler.running] == ["old batch", "young batch"]


def test_a_full_house_of_batch_sequences_gives_its_places_to_online_ones() -> None:
    scheduler = make_scheduler(64, step=64, seqs=2)
    for name, first in (("a", 0), ("b", 50)):
        scheduler.add(make_sequence(name, list(range(first, first + 8)), BATCH))
    compute(scheduler.schedule())
    for name, first in (("x", 100), ("y", 150), ("z", 200)):
        scheduler.add(make_sequence(name, list(range(first, first + 8))))
    assert [name for name, _, _ in spans(scheduler.schedule())] == ["x", "y"]
    assert [sequence.request.id for sequence in scheduler.waiting] == ["z", "a", "b"]


def test_a_step_that_is_taken_back_leaves_everybody_in_the_old_order() -> None:
    scheduler = make_scheduler(64, step=64)
    for name, first, priority in (
        ("a", 0, BATCH),
        ("b", 50, BATCH),
        ("x", 100, ONLINE),
        ("y", 150, ONLINE),
    ):
        scheduler.add(make_sequence(name, list(range(first, first + 8)), priority))
    scheduler.take_back(scheduler.schedule())
    assert [sequence.request.id for sequence in scheduler.waiting] == ["x", "y", "a", "b"]


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(1, 12),
            st.integers(0, 2),
            st.sampled_from([ONLINE, BATCH]),
        ),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(9, 20),
    step=st.integers(1, 24),
    seqs=st.integers(1, 6),
    batch_step=st.integers(1, 24),
    late=st.integers(0, 6),
)
def test_every_load_finishes_and_leaks_nothing(
    lengths: list[tuple[int, int, int, Priority]],
    num_blocks: int,
    step: int,
    seqs: int,
    batch_step: int,
    late: int,
) -> None:
    scheduler = make_scheduler(num_blocks, step=step, seqs=seqs, batch_step=batch_step)
    wanted = {}
    sequences = []
    for i, (num_prompt, num_output, shared, priority) in enumerate(lengths):
        prompt = [7] * min(num_prompt, shared * SIZE) + [100 + i] * max(
            num_prompt - shared * SIZE, 0
        )
        sequences.append(make_sequence(str(i), prompt, priority))
        wanted[str(i)] = num_prompt + num_output
    first = max(len(sequences) - late, 0)
    for sequence in sequences[:first]:
        scheduler.add(sequence)
    arriving = sequences[first:]
    for _ in range(2000):
        if arriving:
            scheduler.add(arriving.pop())
        if not scheduler.has_work():
            break
        chunks = scheduler.schedule()
        assert chunks, "work is left but nothing was scheduled"
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        assert num_tokens <= step
        priorities = [chunk.sequence.priority for chunk in chunks]
        assert priorities == sorted(priorities)
        assert BATCH not in priorities or num_tokens <= batch_step
        for chunk in chunks:
            assert len(chunk.sequence.block_table) * SIZE >= chunk.end
        scheduler.blocks.check()
        compute(chunks, token=9)
        for chunk in chunks:
            if chunk.sequence.num_tokens > wanted[chunk.sequence.request.id]:
                scheduler.finish(chunk.sequence)
    assert not scheduler.has_work()
    assert scheduler.blocks.num_free == num_blocks
    scheduler.blocks.check()
