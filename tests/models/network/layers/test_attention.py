"""Both forms of attention against one query at a time, over the batches that the scheduler really
makes.

The oracle reads from the sequences themselves what a token may see and where that lies in the
cache; it knows nothing of groups, prefixes, padding or pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch.models.engine.api.request import Choose, Embed, Generate, Inspect, Request, Work
from glm_batch.models.engine.execution import batch as batching
from glm_batch.models.engine.execution.batch import Batch, Group, build_step
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.engine.scheduling.block_manager import BlockManager
from glm_batch.models.engine.scheduling.scheduler import Chunk, Scheduler
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.all_answers import answer_to
from glm_batch.models.engine.works.answer import Context
from glm_batch.models.network.layers.attention import (
    AttentionGroup,
    attend_grouped,
    attend_reference,
    store,
)

SEEDS = range(24)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
NUM_BLOCKS = 64
TOKENIZER: Any = SimpleNamespace(eos_token_ids=(1,))
CONTEXT = Context(SimpleNamespace(pad_token_id=None), TOKENIZER, max_model_len=1000)  # type: ignore[arg-type]
ATTENDS = {"reference": attend_reference, "grouped": attend_grouped}


@dataclass(frozen=True)
class Step:
    chunks: list[Chunk]
    batch: Batch
    block_size: int


def random_choose(rng: np.random.Generator) -> Choose:
    choices = {
        tuple(rng.integers(0, 3, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 7))
    }
    return Choose(choices=tuple(sorted(choices)), count_end=bool(rng.integers(2)))


def random_sequence(rng: np.random.Generator, i: int) -> Sequence:
    """Prompts are one of three beginnings and something of their own, so that prefixes are shared."""
    beginning = np.random.default_rng(rng.integers(3)).integers(0, 9, 40)[: rng.integers(0, 40)]
    prompt = [*beginning.tolist(), *rng.integers(0, 9, rng.integers(1, 30)).tolist()]
    work: Work = (Generate(), Choose(choices=((1,),)), Embed(), Inspect())[rng.integers(4)]
    if isinstance(work, Choose):
        work = random_choose(rng)
    (sequence,) = answer_to(Request(id=str(i), input_ids=prompt, work=work), CONTEXT).sequences(
        None
    )
    return sequence


def steps(seed: int) -> Iterator[Step]:
    """A run of the scheduler over a random load; each step as the engine would compute it."""
    rng = np.random.default_rng(seed)
    block_size = int(rng.choice([2, 4, 8]))
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, block_size, prefix_caching=bool(rng.integers(4))),
        max_step_tokens=int(rng.choice([7, 40, 200])),
        max_num_seqs=int(rng.choice([3, 20])),
    )
    for i in range(14):
        scheduler.add(random_sequence(rng, i))
    while scheduler.has_work():
        chunks = scheduler.schedule()
        step = build_step(chunks, scheduler, num_heads=NUM_HEADS, num_ids=9)
        yield Step(chunks, step.batch, block_size)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            if not sequence.num_owed:
                if isinstance(sequence.request.work, Generate) and rng.integers(6):
                    sequence.tokens += rng.integers(0, 9, rng.integers(1, 4)).tolist()
                else:
                    scheduler.finish(sequence)


def visible_slots(step: Step) -> list[list[int]]:
    """For each packed token the cache slots that it may see, by definition."""
    found = []
    for chunk in step.chunks:
        sequence = chunk.sequence
        for index in range(chunk.start, chunk.end):
            seen = list(
                range(min(index + 1, sequence.num_prompt)) if sequence.tree else range(index + 1)
            )
            if sequence.tree and index >= sequence.num_prompt:
                node = index - sequence.num_prompt
                while node >= 0:
                    seen.append(sequence.num_prompt + node)
                    node = sequence.tree.parents[node]
            table, size = sequence.block_table, step.block_size
            found.append([table[token // size] * size + token % size for token in seen])
    return found


def attend_one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: list[list[int]]
) -> torch.Tensor:
    """q [rows, heads, D]: query head i reads kv head i // G."""
    out = torch.empty_like(q, dtype=torch.float64)
    for row, slots in enumerate(seen):
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            scores = k[kv_head, slots].double() @ q[row, head].double() / HEAD_DIM**0.5
            out[row, head] = scores.softmax(0) @ v[kv_head, slots].double()
    return out


def tensors(groups: tuple[Group, ...]) -> tuple[AttentionGroup, ...]:
    config = SimpleNamespace(
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
    )
    model = SimpleNamespace(
        config=config,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return tuple(map(TorchRunner(model, num_slots=1)._group, groups))  # type: ignore[arg-type]


@pytest.mark.parametrize("max_scores", [batching.MAX_SCORES, 3000])
@pytest.mark.parametrize("seed", SEEDS)
def test_attention_is_that_of_one_query_at_a_time(
    monkeypatch: pytest.MonkeyPatch, seed: int, max_scores: int
) -> None:
    monkeypatch.setattr(batching, "MAX_SCORES", max_scores)
    generator = torch.Generator().manual_seed(seed)
    for step in islice(steps(seed), 12):
        rows, out_rows = len(step.batch.input_ids), torch.from_numpy(step.batch.out_rows)
        shape = (NUM_KV_HEADS, NUM_BLOCKS * step.block_size, HEAD_DIM)
        q = 2 * torch.randn(rows, NUM_HEADS, HEAD_DIM, generator=generator)
        k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        expected = attend_one_by_one(q, k, v, visible_slots(step)).float()
        for attend in ATTENDS.values():
            whole = attend(q, k, v, tensors(step.batch.groups))
            torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
            wanted = attend(q[out_rows], k, v, tensors(step.batch.out_groups))
            torch.testing.assert_close(wanted, expected[out_rows], atol=1e-5, rtol=0)


def test_the_random_loads_reach_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_SCORES", 3000)
    seen = set()
    for seed in SEEDS:
        for step in steps(seed):
            for group in step.batch.groups:
                for part in group.parts:
                    one, prefix = (
                        len(part.rows) == 1,
                        "prefix" if len(group.prefix_slots) else "no prefix",
                    )
                    seen.add(("one sequence" if one else "many sequences", prefix))
                    seen.add("padded queries" if part.keep is not None else "equal queries")
            long = [
                chunk for chunk in step.chunks if chunk.end - chunk.start > batching.SHORT_QUERIES
            ]
            if sum(len(group.parts) for group in step.batch.groups) > len(step.chunks):
                seen.add("pieces")
            if long and len(long) < len(step.chunks):
                seen.add("long beside short")
            if any(
                chunk.sequence.tree and chunk.end > chunk.sequence.num_prompt
                for chunk in step.chunks
            ):
                seen.add("tree")
            if any(
                chunk.sequence.tree and chunk.sequence.num_prompt < chunk.start < chunk.end
                for chunk in step.chunks
            ):
                seen.add("cut tree")
    assert seen == {
        *(
            (count, prefix)
            for count in ("one sequence", "many sequences")
            for prefix in ("prefix", "no prefix")
        ),
        *("padded queries", "equal queries", "pieces", "long beside short", "tree", "cut tree"),
    }


def test_store_writes_each_token_into_its_slot() -> None:
    cache = torch.zeros(NUM_KV_HEADS, 10, HEAD_DIM)
    values = torch.randn(3, NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([7, 0, 4])
    store(cache, slots, values)
    assert torch.equal(cache[:, slots], values.transpose(0, 1))
    assert cache.count_nonzero() == values.numel()
