"""The sampler against transformers' logits processors, against the distributions it must follow,
and its seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.engine.execution import sampler
from glm_batch.models.engine.execution.sampler import (
    SampleRow,
    exponential_noise,
    noise_key,
    sample,
)

VOCAB = 40
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def row(
    prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **options: Any
) -> SampleRow:
    own = {
        name: options.pop(name)
        for name in ("sample_index", "end_ids", "bitmask")
        if name in options
    }
    return SampleRow(params=SamplingParams(**options), prompt_ids=prompt, output_ids=output, **own)


def bitmask(allowed: list[int], vocab_size: int = VOCAB) -> np.ndarray:
    bits = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def draws(logits: torch.Tensor, count: int, **options: Any) -> Counter[int]:
    """How often each id is drawn from one row of logits under `count` seeds."""
    rows = [row(seed=seed, **options) for seed in range(count)]
    return Counter(sample(logits.expand(count, -1), rows, vocab_size=logits.shape[-1]).token_ids)


def chi_square(observed: Counter[int], probabilities: torch.Tensor) -> float:
    """(statistic - degrees of freedom) / sqrt(2 * degrees of freedom): about standard normal for a
    true sampler.
    """
    count = sum(observed.values())
    expected = {id: float(p) * count for id, p in enumerate(probabilities) if p > 0}
    assert set(observed) <= set(expected), "an id of probability 0 was drawn"
    statistic = sum((observed[id] - mean) ** 2 / mean for id, mean in expected.items())
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom) if freedom else 0.0


def reference(
    logits: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...], p: SamplingParams
) -> torch.Tensor:
    """The probabilities to sample from, by transformers' processors in our order."""
    ids = torch.tensor([[*prompt, *output]])
    scores = logits[None].clone()
    if p.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    for id, times in Counter(output).items():
        scores[0, id] -= p.presence_penalty + times * p.frequency_penalty
    scores = hf.TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.min_p > 0:
        scores = hf.MinPLogitsWarper(p.min_p)(ids, scores)
    if p.top_k:
        scores = hf.TopKLogitsWarper(p.top_k)(ids, scores)
    if p.top_p < 1:
        scores = hf.TopPLogitsWarper(p.top_p)(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.3, "min_p": 0.05, "top_k": 12, "top_p": 0.8},
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.7, "top_p": 0.9},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8, "top_k": 20},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": -0.7,
            "frequency_penalty": 0.4,
            "top_p": 0.95,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [8, 1024])
def test_draws_follow_the_distribution_of_transformers(
    options: dict[str, Any], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "WINDOW", window)
    torch.manual_seed(len(str(options)))
    logits = 2 * torch.randn(VOCAB)
    prompt, output = (3, 4, 5, 5), (5, 6, 6, 6, 30)
    options = {"temperature": 1.0, **options}
    wanted = reference(logits, prompt, output, SamplingParams(**options))
    assert chi_square(draws(logits, 4000, prompt=prompt, output=output, **options), wanted) < 5


def test_the_support_is_exactly_that_of_transformers() -> None:
    """Every token the filters leave can be drawn, and no other: with flat kept logits each shows
    up.
    """
    torch.manual_seed(0)
    for _ in range(50):
        logits = 1.5 * torch.randn(VOCAB)
        p = SamplingParams(
            temperature=float(torch.rand(()) + 0.5),
            top_k=int(torch.randint(0, VOCAB, ())),
            top_p=float(torch.rand(()) * 0.99 + 0.01),
            min_p=float(torch.rand(()) * 0.2),
        )
        values, ids = logits[None].topk(VOCAB)
        kept, _ = sampler._keep_top(values.double() / p.temperature, [p], VOCAB)
        ours = set(ids[kept].tolist())
        without_top_p = SamplingParams(temperature=p.temperature, top_k=p.top_k, min_p=p.min_p)
        theirs = set(reference(logits, (), (), without_top_p).nonzero()[:, 0].tolist())
        assert ours == theirs


def test_a_narrow_window_draws_the_same_tokens_as_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(60, 500)
    rows = [
        row(
            seed=i,
            temperature=0.5 + i % 7 / 4,
            top_k=i % 5 * 9,
            top_p=[1.0, 0.3, 0.9][i % 3],
            min_p=i % 2 * 0.1,
        )
        for i in range(60)
    ]
    tokens = []
    for window in (1, 4, 32, 500):
        monkeypatch.setattr(sampler, "WINDOW", window)
        tokens.append(sample(logits, rows, vocab_size=500).token_ids)
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]


def test_greedy_rows_take_the_argmax_and_sampled_rows_of_temperature_zero_too() -> None:
    torch.manual_seed(2)
    logits = torch.randn(5, VOCAB)
    best = logits.argmax(-1).tolist()
    assert sample(logits, [row()] * 5, vocab_size=VOCAB).token_ids == best
    mixed = [
        row(temperature=1e-9),
        row(top_p=0.1),
        row(temperature=0.7, top_k=1),
        row(temperature=2.0, top_p=1e-6),
        row(),
    ]
    assert sample(logits, mixed, vocab_size=VOCAB).token_ids == best


def test_penalties_change_a_greedy_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.5
    assert sample(
        logits, [row(prompt=(7,), repetition_penalty=2.0)], vocab_size=VOCAB
    ).token_ids == [8]
    assert sample(logits, [row(prompt=(7,), presence_penalty=2.0)], vocab_size=VOCAB).token_ids == [
        7
    ]
    assert sample(logits, [row(output=(7,), presence_penalty=0.6)], vocab_size=VOCAB).token_ids == [
        8
    ]
    assert sample(
        logits, [row(output=(7,), frequency_penalty=0.4)], vocab_size=VOCAB
    ).token_ids == [7]
    assert sample(
        logits, [row(output=(7, 7), frequency_penalty=0.4)], vocab_size=VOCAB
    ).token_ids == [8]


def test_a_request_draws_the_same_tokens_in_any_batch() -> None:
    torch.manual_seed(3)
    logits = torch.randn(24, VOCAB)
    rows = [
        row(
            seed=i,
            output=tuple(range(i % 4)),
            temperature=1.0,
            top_k=i % 3 * 4,
            sample_index=i % 2,
            logprobs=i % 2,
        )
        for i in range(24)
    ]
    together = sample(logits, rows, vocab_size=VOCAB).token_ids
    alone = [sample(logits[i : i + 1], [rows[i]], vocab_size=VOCAB).token_ids[0] for i in range(24)]
    order = torch.randperm(24).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order], vocab_size=VOCAB).token_ids
    assert together == alone == [shuffled[order.index(i)] for i in range(24)]


def test_seed_index_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 5000)
    base = {"seed": 1, "sample_index": 0, "temperature": 1.0, "output": (4,)}

    def draw(**change: Any) -> int:
        return sample(logits, [row(**{**base, **change})], vocab_size=5000).token_ids[0]

    assert draw() == draw()
    assert (
        len(
            {
                draw(),
                draw(seed=2),
                draw(sample_index=1),
                draw(output=(4, 4)),
                draw(seed=-1),
                draw(seed=2**70),
            }
        )
        == 6
    )
    assert draw(output=(9,)) == draw(), "the ids before do not matter, the position does"


def test_noise_is_standard_exponential_and_independent_across_ids_and_positions() -> None:
    keys = torch.tensor([noise_key(0, 0, position) for position in range(400)])
    noise = exponential_noise(keys, torch.arange(1000))
    assert noise.min() > 0
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(1.0, abs=0.01)
    assert noise.var().item() == pytest.approx(1.0, abs=0.03)
    for left, right in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        assert torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].abs() < 0.01


def test_noise_values_are_frozen() -> None:
    """Written down from the definition in plain integers; reruns on any device and version must
    repeat them.
    """

    def by_definition(key: int, id: int) -> float:
        mask = (1 << 64) - 1
        bits = (key + id * 0x9E3779B97F4A7C15) & mask
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & mask
        bits ^= bits >> 31
        return -math.log1p(-(((bits >> 12) + 0.5) / (1 << 52)))

    keys = [noise_key(seed, 3, 5) for seed in range(6)]
    ids = [0, 1, 31, 151551]
    wanted = torch.tensor(
        [[by_definition(key, id) for id in ids] for key in keys], dtype=torch.float64
    )
    torch.testing.assert_close(
        exponential_noise(torch.tensor(keys), torch.tensor(ids)), wanted, rtol=1e-14, atol=0
    )
    assert noise_key(0, 0, 0) == 2558736989570252433


def test_ids_beyond_the_tokenizer_are_never_chosen() -> None:
    logits = torch.zeros(6, VOCAB + 24)
    logits[:, VOCAB:] = 50.0
    rows = [
        row(),
        row(temperature=1.0),
        row(temperature=1.0, top_k=3),
        row(temperature=3.0, top_p=0.5),
    ]
    rows += [row(repetition_penalty=2.0, prompt=(VOCAB + 1, 3)), row(logprobs=5)]
    sampled = sample(logits, rows, vocab_size=VOCAB)
    assert max(sampled.token_ids) < VOCAB
    top = sampled.top_logprobs[5]
    assert top is not None
    assert all(entry.token_id < VOCAB for entry in top)
    assert top[0].logprob == pytest.approx(-50 - math.log(24), abs=1e-3), (
        "the padding's probability is the model's"
    )


def test_end_ids_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 11] = 5.0, 4.0
    options = {"min_tokens": 2, "end_ids": (9, 11), "max_tokens": 9}
    assert sample(logits, [row(output=(1,), **options)], vocab_size=VOCAB).token_ids[0] not in (
        9,
        11,
    )
    assert sample(logits, [row(output=(1, 1), **options)], vocab_size=VOCAB).token_ids == [9]


def test_a_finished_constraint_outranks_min_tokens() -> None:
    options = {"min_tokens": 5, "end_ids": (9,), "max_tokens": 9}
    sampled = sample(
        torch.zeros(1, VOCAB), [row(bitmask=bitmask([9]), **options)], vocab_size=VOCAB
    )
    assert sampled.token_ids == [9]
    assert not sampled.errors
    both = sample(
        torch.zeros(1, VOCAB), [row(bitmask=bitmask([9, 35]), **options)], vocab_size=VOCAB
    )
    assert both.token_ids == [35]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_only_ids_of_the_bitmask_are_chosen(options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    logits = torch.randn(60, VOCAB)
    allowed = [sorted(torch.randperm(VOCAB)[: 1 + i % 5].tolist()) for i in range(60)]
    rows = [row(bitmask=bitmask(ids), seed=i, **options) for i, ids in enumerate(allowed)]
    sampled = sample(logits, rows, vocab_size=VOCAB)
    assert all(token in ids for token, ids in zip(sampled.token_ids, allowed, strict=True))
    if not options:
        masked = [
            max(ids, key=lambda id, i=i: float(logits[i, id])) for i, ids in enumerate(allowed)
        ]
        assert sampled.token_ids == masked


def test_logprobs_are_those_of_the_unchanged_model_distribution() -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, VOCAB)
    rows = [
        row(logprobs=4, temperature=0.3, top_k=2, repetition_penalty=3.0),
        row(),
        row(logprobs=1, bitmask=bitmask([7])),
    ]
    sampled = sample(logits, rows, vocab_size=VOCAB)
    raw = logits.log_softmax(-1)
    assert sampled.logprobs[0] == pytest.approx(float(raw[0, sampled.token_ids[0]]), abs=1e-5)
    assert sampled.logprobs[2] == pytest.approx(float(raw[2, 7]), abs=1e-5)
    assert sampled.logprobs[1] is None
    assert sampled.top_logprobs[1] is None
    values, ids = raw[0].topk(4)
    top = sampled.top_logprobs[0]
    assert top is not None
    assert [entry.token_id for entry in top] == ids.tolist()
    assert [entry.logprob for entry in top] == pytest.approx(values.tolist(), abs=1e-5)
    assert len(sampled.top_logprobs[2] or ()) == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4}])
def test_a_row_that_cannot_be_sampled_is_an_error_of_that_row_alone(
    options: dict[str, Any],
) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    rows = [row(**options), row(**options), row(**options), row(bitmask=bitmask([]), **options)]
    sampled = sample(logits, rows, vocab_size=VOCAB)
    assert {i: error.code for i, error in sampled.errors.items()} == {
        1: "not_finite",
        2: "not_finite",
        3: "no_token",
    }


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(
        logits,
        [row(repetition_penalty=2.0), row(temperature=1.0, bitmask=bitmask([1, 2]))],
        vocab_size=VOCAB,
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_draws_the_same_tokens(device: str) -> None:
    torch.manual_seed(6)
    logits = torch.randn(64, 5000)
    rows = [
        row(
            seed=i,
            temperature=1.0,
            top_k=i % 3 * 50,
            top_p=[1.0, 0.8][i % 2],
            repetition_penalty=1 + i % 4 / 10,
        )
        for i in range(64)
    ]
    tokens = sample(logits.to(device), rows, vocab_size=5000).token_ids
    assert tokens == sample(logits, rows, vocab_size=5000).token_ids
