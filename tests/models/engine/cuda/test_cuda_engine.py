"""The engine with fused kernels and recorded decode steps gives what the plain engine gives, for
every kind of work.

Needs a CUDA device; with TRITON_INTERPRET=1 and triton installed it runs without one, slowly and
without recording.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch.models.checkpoint.config_reader import load_config
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
from glm_batch.models.engine.cuda.batch_paged import TILE_ROWS
from glm_batch.models.engine.cuda.kernels import resolve_tile_queries
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.errors import ConfigError
from tests.models.conftest import MakeCheckpoint, random_ids
from tests.models.media_cases import MakeGlm4v, make_glm4v, make_prompt
from tests.models.triton_device import DEVICE, fused_engine

__all__ = ["make_glm4v"]  # a fixture

ATOL = 5e-5
LIMITS: dict[str, Any] = {
    "kv_cache_tokens": 2048,
    "max_step_tokens": 64,
    "max_num_seqs": 6,
    "dtype": "float32",
}


def requests(work: Any, count: int) -> list[Request]:
    """Prompts that share a beginning, of many lengths."""
    prefix = random_ids(7, 29)
    return [
        Request(id=f"r{i}", input_ids=prefix + random_ids(i, 2 + 11 * i % 37), work=work)
        for i in range(count)
    ]


def run(engine: TorchEngine, wanted: list[Request]) -> dict[str, Completion]:
    engine.submit(wanted)
    done = {}
    while engine.has_work():
        done.update({completion.id: completion for completion in engine.step()})
    return done


def assert_same(one: dict[str, Completion], other: dict[str, Completion]) -> None:
    assert one.keys() == other.keys()
    for id, a in one.items():
        b = other[id]
        assert (a.error, a.finish_reason, a.cached_tokens) == (
            b.error,
            b.finish_reason,
            b.cached_tokens,
        )
        assert [output.token_ids for output in a.outputs] == [
            output.token_ids for output in b.outputs
        ]
        for x, y in zip(a.outputs, b.outputs, strict=True):
            np.testing.assert_allclose(x.logprobs or (), y.logprobs or (), atol=ATOL)
        np.testing.assert_allclose(a.choice_logprobs or (), b.choice_logprobs or (), atol=ATOL)
        if a.array is not None:
            np.testing.assert_allclose(a.array, b.array, atol=ATOL)


WORKS = {
    "greedy": Generate(sampling=SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1)),
    "sampled": Generate(
        sampling=SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0, top_p=0.9, n=2)
    ),
    "choose": Choose(choices=((5,), (5, 6), (7, 8, 9), (7, 8, 10)), count_end=True),
    "embed": Embed(pooling="mean"),
    "inspect": Inspect(what="hidden_states"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["glm", "glm4"])
@pytest.mark.parametrize("work", WORKS)
def test_fused_engine_is_the_plain_one(
    make_checkpoint: MakeCheckpoint, family: str, work: str
) -> None:
    path = make_checkpoint(family)
    wanted = requests(WORKS[work], 8 if DEVICE.type == "cuda" else 3)
    plain = TorchEngine.from_checkpoint(EngineConfig(model=str(path), device=str(DEVICE), **LIMITS))
    expected = run(plain, wanted)
    engine = fused_engine(path, LIMITS)
    assert_same(run(engine, wanted), expected)
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks


@pytest.mark.gpu
@pytest.mark.parametrize("work", ["greedy", "choose"])
def test_fused_engine_sees_images_and_videos(make_glm4v: MakeGlm4v, work: str) -> None:
    path = make_glm4v()
    prompts = [
        make_prompt(parts, seed=i)
        for i, parts in enumerate([[9, (1, 4, 4), 3], [4, [(2, 4, 4)], 2], [12]])
    ]
    wanted = [
        Request(id=str(i), input_ids=prompt.ids, media=prompt.media, work=WORKS[work])
        for i, prompt in enumerate(prompts)
    ]
    plain = TorchEngine.from_checkpoint(EngineConfig(model=str(path), device=str(DEVICE), **LIMITS))
    expected = run(plain, wanted)
    assert all(done.error is None for done in expected.values())
    assert_same(run(fused_engine(path, LIMITS), wanted), expected)


@pytest.mark.gpu
def test_after_freeing_memory_steps_are_recorded_anew(make_checkpoint: MakeCheckpoint) -> None:
    wanted = requests(WORKS["greedy"], 3)
    engine = fused_engine(make_checkpoint(), LIMITS)
    first = run(engine, wanted)
    engine._runner.free_memory()
    again = run(engine, wanted)
    for id, done in again.items():
        assert done.outputs[0].token_ids == first[id].outputs[0].token_ids


@pytest.mark.gpu
def test_a_closed_engine_lets_the_model_go(make_checkpoint: MakeCheckpoint) -> None:
    engine = fused_engine(make_checkpoint(), LIMITS)
    run(engine, requests(WORKS["greedy"], 1))
    runner = weakref.ref(engine._runner)
    engine.close()
    assert runner() is None


def test_kernels_are_refused_where_they_cannot_run(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_checkpoint())
    config = EngineConfig(model=path, device="cpu", cuda_kernels=True)
    with pytest.raises(ConfigError, match="NVIDIA GPUs, not on cpu"):
        TorchEngine.from_checkpoint(config)
    gpu, model = torch.device("cuda"), load_config(path)
    with pytest.raises(ConfigError, match="they run on one rank"):
        resolve_tile_queries(replace(config, tensor_parallel_size=2), model, gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        resolve_tile_queries(config, model, gpu)
    assert resolve_tile_queries(replace(config, cuda_kernels=False), model, gpu) == 0


def test_a_tile_has_as_many_queries_as_its_rows_hold(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight query heads of two kv heads: four rows a query."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config = EngineConfig(model=str(make_checkpoint(shape="gqa4")), cuda_kernels=True)
    assert (
        resolve_tile_queries(config, load_config(config.model), torch.device("cuda"))
        == TILE_ROWS // 4
    )
