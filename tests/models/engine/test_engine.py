"""However work is batched, cut, cached, preempted or laid out as a tree, the numbers are those of a
plain forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch.models.engine import (
    Choose,
    Completion,
    Embed,
    EngineConfig,
    Generate,
    Inspect,
    Request,
    SamplingParams,
)
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.errors import RowError
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids

ATOL = 5e-5
GREEDY = Generate(sampling=SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2))
SAMPLED = Generate(
    sampling=SamplingParams(
        max_tokens=24, ignore_eos=True, temperature=1.0, seed=3, n=2, logprobs=1
    )
)


@pytest.fixture(scope="module")
def path(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("glm4")


def build(path: Path, **config: Any) -> TorchEngine:
    return TorchEngine.from_checkpoint(
        EngineConfig(model=str(path), **({"kv_cache_tokens": 4096} | config))
    )


def run(engine: TorchEngine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done = {}
    while engine.has_work():
        for completion in engine.step():
            assert completion.id not in done
            done[completion.id] = completion
        engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
    return done


def prompts(count: int, *, shared: int) -> list[list[int]]:
    """Prompts of many lengths that begin with the same tokens."""
    prefix = random_ids(100, shared)
    return [prefix + random_ids(200 + i, 3 + 7 * i % 41) for i in range(count)]


def requests(work: Any, ids: list[list[int]]) -> list[Request]:
    return [Request(id=f"r{i}", input_ids=prompt, work=work) for i, prompt in enumerate(ids)]


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        got = found[key]
        assert got.error is None
        assert [output.token_ids for output in got.outputs] == [
            output.token_ids for output in want.outputs
        ]
        for ours, theirs in zip(got.outputs, want.outputs, strict=True):
            np.testing.assert_allclose(ours.logprobs or [], theirs.logprobs or [], atol=ATOL)
        np.testing.assert_allclose(got.choice_logprobs or [], want.choice_logprobs or [], atol=ATOL)


CHOICES = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
WORKS = {"greedy": GREEDY, "sampled": SAMPLED, "choose": Choose(choices=CHOICES, count_end=True)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "together": {"block_size": 4},
    "small steps": {"max_step_tokens": 13},
    "one token steps": {"max_step_tokens": 1, "max_num_seqs": 2},
    "no prefix cache": {"prefix_caching": False},
    "large blocks": {"block_size": 64},
    "preempted": {"kv_cache_tokens": 200, "block_size": 4},
}


@pytest.fixture(scope="module")
def one_by_one(path: Path) -> dict[str, dict[str, Completion]]:
    """Every request alone in a fresh engine without a cache: the slow path that must be right."""
    found = {}
    for name, work in WORKS.items():
        engine = build(path, prefix_caching=False)
        found[name] = {}
        for request in requests(work, prompts(8, shared=37)):
            found[name] |= run(engine, [request])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("work", WORKS)
def test_every_layout_gives_what_one_by_one_gives(
    path: Path, one_by_one: dict[str, dict[str, Completion]], work: str, layout: str
) -> None:
    engine = build(path, **LAYOUTS[layout])
    found = run(engine, requests(WORKS[work], prompts(8, shared=37)))
    assert_same(found, one_by_one[work])
    if layout == "preempted" and work != "choose":
        assert engine.scheduler.num_preemptions > 0
    if layout == "together":
        assert sum(completion.cached_tokens for completion in found.values()) >= 7 * 36


def test_a_second_run_hits_the_cache_and_says_the_same(path: Path) -> None:
    engine = build(path)
    ids = prompts(4, shared=30)
    first, second = run(engine, requests(GREEDY, ids)), run(engine, requests(GREEDY, ids))
    assert_same(second, first)
    size = engine.limits.block_size
    assert [second[f"r{i}"].cached_tokens for i in range(4)] == [
        (len(p) - 1) // size * size for p in ids
    ]


@pytest.mark.parametrize("count_end", [False, True])
def test_choice_scores_equal_separate_full_forwards(path: Path, count_end: bool) -> None:
    """The oracle runs prompt + label once for each label and reads every probability off a whole
    softmax.
    """
    oracle = load_oracle(path)
    prompt = random_ids(1, 33)
    expected = []
    for choice in CHOICES:
        with torch.no_grad():
            logprobs = (
                oracle(torch.tensor([prompt + list(choice)])).logits[0].double().log_softmax(-1)
            )
        total = sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(choice))
        if count_end:
            total += logprobs[-1, [256, 260]].logsumexp(0)
        expected.append(float(total))
    for max_step_tokens in (512, 34, 5):  # whole; cut inside the tree; cut everywhere
        engine = build(path, max_step_tokens=max_step_tokens)
        found = run(
            engine,
            [Request(id="r", input_ids=prompt, work=Choose(choices=CHOICES, count_end=count_end))],
        )
        np.testing.assert_allclose(found["r"].choice_logprobs, expected, atol=ATOL)


def test_mixed_works_share_one_batch(path: Path) -> None:
    ids = prompts(6, shared=20)
    works = [
        GREEDY,
        Choose(choices=CHOICES),
        Embed(pooling="mean"),
        Inspect(what="hidden_states"),
        SAMPLED,
        Embed(),
    ]
    mixed = [
        Request(id=f"r{i}", input_ids=prompt, work=work)
        for i, (prompt, work) in enumerate(zip(ids, works, strict=True))
    ]
    together = run(build(path, max_step_tokens=50), mixed)
    for request in mixed:
        alone = run(build(path, prefix_caching=False), [request])
        assert_same({request.id: together[request.id]}, alone)
        if alone[request.id].array is not None:
            np.testing.assert_allclose(
                together[request.id].array, alone[request.id].array, atol=ATOL
            )


def test_what_can_never_fit_the_cache_is_refused_at_once(path: Path) -> None:
    engine = build(path, kv_cache_tokens=32, block_size=4)
    found = run(engine, requests(GREEDY, [random_ids(1, 9), random_ids(2, 8)]))
    assert found["r0"].error is not None
    assert found["r0"].error.code == "prompt_too_long"
    assert "kv_cache_tokens" in found["r0"].error.message
    assert len(found["r1"].outputs[0].token_ids) == 24


def test_output_that_reaches_the_models_length_says_so(path: Path) -> None:
    engine = build(path, max_model_len=40)
    found = run(engine, requests(GREEDY, [random_ids(1, 30), random_ids(2, 40)]))
    assert found["r0"].outputs[0].finish_reason == "length"
    assert len(found["r0"].outputs[0].token_ids) == 10
    assert found["r1"].error is not None
    assert found["r1"].error.code == "prompt_too_long"


class BrokenMatcher:
    """A constraint that gives up after two tokens, as a grammar beyond its resource limits does."""

    is_done = False

    def __init__(self) -> None:
        self.left = 2

    def bitmask(self) -> None:
        if not self.left:
            raise RowError("constraint_failed", "too complex")

    def accept(self, token_id: int) -> None:
        self.left -= 1

    def forced_tokens(self) -> list[int]:
        return []


def test_a_constraint_that_fails_costs_its_own_request_only(path: Path) -> None:
    """A matcher's RowError once escaped step() and took every other request with it."""
    engine = build(path)
    ids = prompts(3, shared=10)
    engine.submit(requests(GREEDY, ids))
    engine._pending["r1"].answer.decodings[0].matcher = BrokenMatcher()  # type: ignore[assignment]
    done = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    assert done["r1"].error is not None
    assert done["r1"].error.code == "constraint_failed"
    assert len(done["r0"].outputs[0].token_ids) == len(done["r2"].outputs[0].token_ids) == 24
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
