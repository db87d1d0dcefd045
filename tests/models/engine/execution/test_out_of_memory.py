"""Memory that runs out in a step costs smaller steps, or the row that does not fit alone; nothing
else changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
    Request,
    SamplingParams,
)
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.scheduling.scheduler import (
    STEPS_TO_RECOVER,
    StepSize,
    is_out_of_memory,
)
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.engine.works.readout import StepOutput
from tests.models.conftest import MakeCheckpoint, random_ids

POISON = 255
ATOL = 5e-5


class FullRunner:
    """A runner whose device says that it is full, before or after it has computed the step."""

    def __init__(
        self, runner: Any, does_not_fit: Callable[[Batch], bool], *, late: bool = False
    ) -> None:
        self.config, self.num_failures = runner.config, 0
        self._runner, self._does_not_fit, self._late = runner, does_not_fit, late

    def run(self, batch: Batch) -> StepOutput:
        if not self._does_not_fit(batch):
            return self._runner.run(batch)  # type: ignore[no-any-return]
        self.num_failures += 1
        if self._late:
            self._runner.run(batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def free_memory(self) -> None:
        self._runner.free_memory()


@pytest.fixture(scope="module")
def path(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("glm4")


def build(
    path: Path, does_not_fit: Callable[[Batch], bool] | None = None, **config: Any
) -> TorchEngine:
    late = config.pop("late", False)
    engine = TorchEngine.from_checkpoint(
        EngineConfig(model=str(path), **({"kv_cache_tokens": 4096} | config))
    )
    if does_not_fit:
        engine._runner = FullRunner(engine._runner, does_not_fit, late=late)
    return engine


def run(engine: TorchEngine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done = {}
    for _ in range(20_000):
        for completion in engine.step():
            assert completion.id not in done
            done[completion.id] = completion
        engine.scheduler.blocks.check()
        if not engine.has_work():
            break
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
    return done


def mixed_requests() -> list[Request]:
    """Prompts that share a beginning, of many lengths, for every kind of work."""
    schema = SamplingParams(
        max_tokens=12, ignore_eos=True, temperature=1.0, seed=3, n=2, logprobs=1
    )
    penalised = SamplingParams(max_tokens=15, ignore_eos=True, repetition_penalty=1.3, min_tokens=3)
    works = [
        Generate(sampling=schema),
        Generate(sampling=penalised),
        Choose(choices=((5,), (5, 6), (7, 8, 9))),
    ]
    works += [Embed(pooling="mean"), Embed()]  # type: ignore[list-item]
    prefix = random_ids(7, 29)
    return [
        Request(
            id=f"r{i}",
            input_ids=prefix + random_ids(i, 2 + 11 * i % 37),
            work=works[i % len(works)],
        )
        for i in range(20)
    ]


def without_poison(ids: list[int]) -> list[int]:
    return [1 if id == POISON else id for id in ids]


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        got = found[key]
        assert got.error is None
        assert [output.token_ids for output in got.outputs] == [
            output.token_ids for output in want.outputs
        ]
        np.testing.assert_allclose(got.choice_logprobs or [], want.choice_logprobs or [], atol=ATOL)
        if want.array is not None:
            np.testing.assert_allclose(got.array, want.array, atol=ATOL)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "config",
    [{}, {"max_step_tokens": 40, "max_num_seqs": 5}, {"kv_cache_tokens": 150, "block_size": 4}],
    ids=["plain", "small steps", "preempted"],
)
def test_steps_that_fail_at_random_change_no_answer(
    path: Path, seed: int, config: dict[str, Any]
) -> None:
    requests = mixed_requests()
    expected = run(build(path, **config), requests)
    chance = random.Random(seed)
    engine = build(
        path,
        lambda batch: len(batch.input_ids) > 1 and chance.random() < 0.5,
        late=seed % 2 == 0,
        **config,
    )
    assert_same(run(engine, requests), expected)
    assert engine._runner.num_failures > 0  # type: ignore[attr-defined]


def test_steps_shrink_to_what_fits_and_grow_again(path: Path) -> None:
    requests = [
        Request(
            id=f"r{i}",
            input_ids=random_ids(i, 60),
            work=Generate(sampling=SamplingParams(max_tokens=40)),
        )
        for i in range(6)
    ]
    is_full = True
    engine = build(path, lambda batch: is_full and len(batch.input_ids) > 50)
    found = run(engine, requests)
    assert_same(found, run(build(path), requests))
    assert engine.scheduler.max_step_tokens < 50
    is_full = False
    for i in range(60):
        run(engine, [Request(id=f"again{i}", input_ids=random_ids(i, 30), work=Generate())])
        if engine.scheduler.max_step_tokens == engine.limits.max_step_tokens:
            break
    assert engine.scheduler.max_step_tokens == engine.limits.max_step_tokens


@pytest.mark.parametrize("where", [0, 3, 7])
def test_a_row_that_does_not_fit_alone_fails_alone(path: Path, where: int) -> None:
    prompts = [without_poison(random_ids(i, 40)) for i in range(8)]
    prompts[where][20] = POISON
    work = Generate(sampling=SamplingParams(max_tokens=10, ignore_eos=True))
    requests = [
        Request(id=f"r{i}", input_ids=prompt, work=work) for i, prompt in enumerate(prompts)
    ]
    engine = build(path, lambda batch: POISON in batch.input_ids)
    # The model may write that token too: then the other rows would not fit either.
    found = run(engine, requests)
    expected = run(build(path), requests)
    error = found.pop(f"r{where}").error
    assert error is not None
    assert error.code == "out_of_memory"
    assert "40 tokens" in error.message
    assert "Tried to allocate" in error.message
    expected.pop(f"r{where}")
    assert_same(found, expected)


def test_what_is_no_lack_of_memory_still_ends_the_engine(path: Path) -> None:
    engine = build(path)

    class BrokenRunner(FullRunner):
        def run(self, batch: Batch) -> StepOutput:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine._runner = BrokenRunner(engine._runner, lambda batch: True)
    engine.submit(mixed_requests())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()


def test_torch_and_python_say_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes (3, 4) and (5, 6) do not match"))


def test_a_limit_that_fails_again_is_tried_again_more_rarely() -> None:
    size = StepSize(64)
    assert size.failed(64, "full")
    assert size.tokens == 32
    waits = []
    for _ in range(3):
        wait = 0
        while size.tokens == 32:
            size.succeeded()
            wait += 1
        waits.append(wait)
        assert size.failed(64, "full")
    assert waits == [STEPS_TO_RECOVER, 2 * STEPS_TO_RECOVER, 4 * STEPS_TO_RECOVER]
