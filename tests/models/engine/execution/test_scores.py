"""A prompt's own log-probabilities: those of a plain forward, however the prompt is cut, cached or
batched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch.models.engine import (
    Completion,
    EngineConfig,
    Generate,
    PromptScores,
    Request,
    SamplingParams,
    Score,
)
from glm_batch.models.engine.execution import runner as runner_module
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.processing.tokenizer import Tokenizer
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids
from tests.models.ranks import parallel_engine

ATOL = 5e-5
TOP = 5


@pytest.fixture(scope="module")
def path(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("glm4")


def build(path: Path, **config: Any) -> TorchEngine:
    return TorchEngine.from_checkpoint(
        EngineConfig(model=str(path), **({"kv_cache_tokens": 4096} | config))
    )


def run(engine: TorchEngine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done: dict[str, Completion] = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
    return done


def score(id: str, ids: list[int], top: int = TOP) -> Request:
    return Request(id=id, input_ids=ids, work=Score(top=top))


def scores_of(completion: Completion) -> PromptScores:
    assert (completion.error, completion.finish_reason) == (None, "scored")
    assert completion.scores is not None
    return completion.scores


def assert_equals(
    found: PromptScores, logprobs: torch.Tensor, ids: list[int], num_ids: int, top: int
) -> None:
    """`logprobs` [tokens, vocab_size] of the oracle."""
    np.testing.assert_allclose(found.logprobs, logprobs[range(len(ids) - 1), ids[1:]], atol=ATOL)
    np.testing.assert_allclose(
        found.top_logprobs, logprobs[:-1, :num_ids].topk(top).values, atol=ATOL
    )
    picked = logprobs[:-1].gather(1, torch.from_numpy(found.top_ids))
    np.testing.assert_allclose(found.top_logprobs, picked, atol=ATOL)


def reference(path: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return load_oracle(path)(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_step_tokens": 7},
        {"max_step_tokens": 1, "max_num_seqs": 2},
        {"prefix_caching": False},
        {"kv_cache_tokens": 120, "block_size": 4, "max_step_tokens": 30},
    ],
    ids=["together", "small steps", "one token steps", "no prefix cache", "little cache"],
)
def test_they_are_those_of_a_plain_forward(
    path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slices of three rows, and answers written in the same steps."""
    monkeypatch.setattr(runner_module, "LOGIT_ROWS", 3)
    prefix = random_ids(1, 16)
    prompts = [prefix + random_ids(10 + i, count) for i, count in enumerate((1, 2, 17, 40))]
    write = Generate(sampling=SamplingParams(max_tokens=24, ignore_eos=True))
    others = [Request(id=f"other{i}", input_ids=ids, work=write) for i, ids in enumerate(prompts)]
    asked = [score(f"r{i}", ids, TOP - i) for i, ids in enumerate(prompts)]
    engine = build(path, **config)
    found = run(engine, [request for pair in zip(others, asked, strict=True) for request in pair])
    num_ids = Tokenizer.from_dir(str(path)).vocab_size
    for i, ids in enumerate(prompts):
        assert found[f"r{i}"].cached_tokens == 0
        assert_equals(scores_of(found[f"r{i}"]), reference(path, ids), ids, num_ids, TOP - i)


def test_the_likeliest_tokens_two_numbers_are_the_same(path: Path) -> None:
    """Clients compare them to see whether a text is what the model would write by itself."""
    engine = build(path)
    prompt = random_ids(3, 20)
    written = run(
        engine,
        [Request(id="w", input_ids=prompt, work=Generate(sampling=SamplingParams(max_tokens=20)))],
    )
    ids = prompt + list(written["w"].outputs[0].token_ids)
    found = scores_of(run(engine, [score("r", ids, 1)])["r"])
    assert (found.logprobs[19:] == found.top_logprobs[19:, 0]).all()
    assert (found.logprobs[:19] < found.top_logprobs[:19, 0]).any()


def test_one_token_has_nothing_before_it(path: Path) -> None:
    found = run(build(path), [score("one", [5]), score("none", [])])
    assert len(scores_of(found["one"]).logprobs) == 0
    assert found["none"].error is not None
    assert found["none"].error.code == "empty_prompt"


def test_what_follows_finds_the_prompt_in_the_cache(path: Path) -> None:
    """Whoever wants both pays for the prompt once."""
    engine = build(path, block_size=4)
    ids = random_ids(4, 41)
    write = Request(id="write", input_ids=ids, work=Generate(sampling=SamplingParams(max_tokens=2)))
    assert run(engine, [score("r", ids), write])["write"].cached_tokens == 40


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_say_the_same(make_checkpoint: MakeCheckpoint, size: int) -> None:
    path = make_checkpoint("glm4", "gqa4", vocab_size=509)
    requests = [score(f"r{i}", random_ids(20 + i, 10 + 30 * i)) for i in range(3)]
    requests.append(Request(id="w", input_ids=random_ids(1, 9), work=Generate()))
    expected = run(build(path, max_step_tokens=50), requests)
    with parallel_engine(path, size, max_step_tokens=50) as engine:
        found = run(engine, requests)
    for request in requests[:3]:
        ours, theirs = scores_of(found[request.id]), scores_of(expected[request.id])
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=ATOL)
        np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, atol=ATOL)


def test_another_head_has_none(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("glm4", head="ForSequenceClassification")
    error = run(build(path), [score("r", [1, 2, 3])])["r"].error
    assert error is not None
    assert error.code == "unsupported_work"


def test_part_of_a_prompt_is_scored_as_in_the_whole_and_what_stands_before_is_cached(
    path: Path,
) -> None:
    ids = random_ids(5, 50)
    engine = build(path, max_step_tokens=16, block_size=4)
    whole = scores_of(run(engine, [score("whole", ids)])["whole"])
    for start in (1, 2, 17, 49, 50):
        part = Request(id="part", input_ids=ids, work=Score(start=start, top=TOP))
        done = run(engine, [part])["part"]
        assert start - 4 <= done.cached_tokens + 1 <= start
        found = scores_of(done)
        np.testing.assert_allclose(found.logprobs, whole.logprobs[start - 1 :], atol=ATOL)
        assert found.top_ids.tolist() == whole.top_ids[start - 1 :].tolist()
    with pytest.raises(ValueError, match="nothing stands before the first token"):
        Score(start=0)
