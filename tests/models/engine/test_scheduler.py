"""Scheduling policy by tables and random loads: all finishes, nothing leaks, the old never wait for the young."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.block_manager import BlockManager
from models.engine.request import Generate, Request, SamplingParams
from models.engine.scheduler import Chunk, Scheduler
from models.engine.sequence import Sequence

SIZE = 4


def make_sequence(name: str, prompt: list[int]) -> Sequence:
    request = Request(id=name, input_ids=prompt, work=Generate(sampling=SamplingParams()))
    return Sequence(request=request, sample_index=0, tokens=list(prompt), num_prompt=len(prompt))


def make_scheduler(num_blocks: int, *, step: int = 16, seqs: int = 8) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, SIZE), max_step_tokens=step, max_num_seqs=seqs)


def compute(chunks: list[Chunk], token: int = 9) -> None:
    """What the engine does after a step: count the tokens as computed, append a sampled one to complete sequences."""
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
    assert spans(scheduler.schedule()) == [("a", 8, 9), ("b", 2, 8)]  # a decode and a prefill chunk in one step


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


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12),
    num_blocks=st.integers(9, 20),
    step=st.integers(1, 24),
    seqs=st.integers(1, 6),
)
def test_every_load_finishes_and_leaks_nothing(
    lengths: list[tuple[int, int, int]], num_blocks: int, step: int, seqs: int
) -> None:
    scheduler = make_scheduler(num_blocks, step=step, seqs=seqs)
    wanted = {}
    for i, (num_prompt, num_output, shared) in enumerate(lengths):
        prompt = [7] * min(num_prompt, shared * SIZE) + [100 + i] * max(num_prompt - shared * SIZE, 0)
        scheduler.add(make_sequence(str(i), prompt))
        wanted[str(i)] = num_prompt + num_output
    for _ in range(2000):
        if not scheduler.has_work():
            break
        chunks = scheduler.schedule()
        assert chunks, "work is left but nothing was scheduled"
        assert sum(chunk.end - chunk.start for chunk in chunks) <= step
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
