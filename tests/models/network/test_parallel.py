"""A model on several ranks is the same model, whatever is asked and however it is dealt."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine import (
    Choose,
    Classify,
    Completion,
    Embed,
    EngineConfig,
    Generate,
    Inspect,
    Request,
    SamplingParams,
    Tag,
)
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.execution.ranks import SharedEncoder
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.engine.works.readout import StepOutput
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.layers.parallel import (
    ParallelGroup,
    Rendezvous,
    check_parts,
    dealt,
    join,
)
from glm_batch.models.network.registry import build_model
from tests.models.checkpoint.test_weights import Tensors, rewritten
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids
from tests.models.media_cases import MakeGlm4v, make_glm4v, make_prompt
from tests.models.ranks import parallel_engine

__all__ = ["make_glm4v"]  # a fixture

ATOL = 5e-5
GREEDY = Generate(sampling=SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2))
SAMPLED = Generate(
    sampling=SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=3, n=2, logprobs=1)
)
CHOOSE = Choose(choices=((5,), (5, 6), (7, 8, 9), (500, 8)), count_end=True)
PREFIX = random_ids(100, 30)


def text_requests(*works: Any) -> list[Request]:
    """Prompts of several lengths, most of which begin alike, with each kind of work in turn."""
    prompts = [PREFIX + random_ids(200 + i, 3 + 7 * i % 41) for i in range(6)] + [random_ids(7, 90)]
    return [
        Request(id=f"{type(work).__name__}{j}-{i}", input_ids=prompt, work=work)
        for j, work in enumerate(works)
        for i, prompt in enumerate(prompts)
    ]


def run(engine: TorchEngine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done: dict[str, Completion] = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    return done


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        got = found[key]
        assert got.error is None
        for ours, theirs in zip(got.outputs, want.outputs, strict=True):
            assert ours.token_ids == theirs.token_ids
            np.testing.assert_allclose(ours.logprobs or [], theirs.logprobs or [], atol=ATOL)
        np.testing.assert_allclose(got.choice_logprobs or (), want.choice_logprobs or (), atol=ATOL)
        assert (got.array is None) == (want.array is None)
        if want.array is not None:
            np.testing.assert_allclose(got.array, want.array, atol=ATOL)


def assert_ranks_agree(
    path: Path, sizes: tuple[int, ...], requests: list[Request], **config: Any
) -> None:
    with parallel_engine(path, 1, **config) as engine:
        expected = run(engine, requests)
    assert all(completion.error is None for completion in expected.values())
    for size in sizes:
        with parallel_engine(path, size, **config) as engine:
            assert_same(run(engine, requests), expected)


@pytest.mark.parametrize(
    ("family", "shape", "sizes", "config"),
    [
        pytest.param(
            "glm4", "gqa4", (2, 4), {}, id="glm4 with 2 kv heads: one of each on 4 ranks twice"
        ),
        pytest.param("glm", "gqa16", (2, 4), {}, id="glm with 1 kv head that all ranks have"),
        pytest.param("glm", "mha", (2,), {}, id="glm with tied embeddings and no biases"),
        pytest.param(
            "glm4", "gqa4", (4,), {"vocab_size": 509}, id="a vocabulary that does not divide"
        ),
    ],
)
def test_any_number_of_ranks_gives_the_same_numbers(
    make_checkpoint: MakeCheckpoint,
    family: str,
    shape: str,
    sizes: tuple[int, ...],
    config: dict[str, Any],
) -> None:
    path = make_checkpoint(family, shape, **config)
    requests = text_requests(GREEDY, SAMPLED, CHOOSE, Embed(pooling="mean"), Inspect(what="logits"))
    assert_ranks_agree(path, sizes, requests, max_step_tokens=96)


def test_ranks_agree_with_the_reference(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("glm4")
    ids = random_ids(5, 60)
    with torch.no_grad():
        expected = load_oracle(path)(torch.tensor([ids])).logits[0].numpy()
    with parallel_engine(path, 4) as engine:
        found = run(engine, [Request(id="r", input_ids=ids, work=Inspect(what="logits"))])[
            "r"
        ].array
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("head", "work"), [("ForSequenceClassification", Classify()), ("ForTokenClassification", Tag())]
)
def test_heads_without_a_vocabulary(make_checkpoint: MakeCheckpoint, head: str, work: Any) -> None:
    path = make_checkpoint("glm4", "gqa4", head, num_labels=5)
    assert_ranks_agree(path, (4,), text_requests(work, Embed(normalize=True)))


def test_images_and_videos(make_glm4v: MakeGlm4v) -> None:
    """In steps so short that an item's features are used in several, and with one item shown twice."""
    parts: list[Any] = [
        [9, (1, 6, 4), 3],
        [4, [(3, 4, 4)], 2],
        [21],
        [9, (1, 4, 4), 2, [(2, 2, 6)], 1, (1, 8, 2), 5],
    ]
    prompts = [make_prompt(each, seed=i) for i, each in enumerate([*parts, parts[0]])]
    prompts.append(prompts[0])
    requests = [
        Request(id=f"{type(work).__name__}{i}", input_ids=prompt.ids, work=work, media=prompt.media)
        for work in (GREEDY, CHOOSE, Embed())
        for i, prompt in enumerate(prompts)
    ]
    assert_ranks_agree(make_glm4v(), (2, 4), requests, max_step_tokens=40)


def test_each_image_is_encoded_on_one_rank(
    make_glm4v: MakeGlm4v, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: dict[int, int] = {}
    whole = SharedEncoder._encode

    def counting(self: Any, items: Any) -> Any:
        found = whole(self, items)
        encoded[self._group.rank] = self.num_encoded
        return found

    monkeypatch.setattr(SharedEncoder, "_encode", counting)
    prompts = [make_prompt([3, (1, 4, 4), 2], seed=i) for i in range(6)]
    with parallel_engine(make_glm4v(), 2) as engine:
        run(
            engine,
            [
                Request(id=f"r{i}", input_ids=p.ids, work=Embed(), media=p.media)
                for i, p in enumerate(prompts)
            ],
        )
        assert encoded == {0: 3, 1: 3}
        run(
            engine,
            [Request(id="again", input_ids=prompts[0].ids, work=Embed(), media=prompts[0].media)],
        )
    assert encoded == {0: 3, 1: 3}


class Alone(ParallelGroup):
    """One rank of several, before it meets the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def loaded(path: Path, rank: int, size: int) -> dict[str, torch.Tensor]:
    model = build_model(
        path, dtype=torch.float32, device=torch.device("cpu"), group=Alone(rank, size)
    )
    return dict(model.backbone.named_parameters()) | {"lm_head": model.head.lm_head.weight}  # type: ignore[union-attr]


def test_each_rank_loads_its_part(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("glm4")  # 8 heads and 2 kv heads of 64, intermediate 320, vocabulary 512
    with safe_open(path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layer = "model.layers.1"
    for rank in range(4):
        found = loaded(path, rank, 4)
        q, kv = slice(128 * rank, 128 * rank + 128), slice(64 * (rank // 2), 64 * (rank // 2) + 64)
        rows = [("q", q), ("k", kv), ("v", kv)]
        for kind in ("weight", "bias"):
            expected = torch.cat(
                [stored[f"{layer}.self_attn.{part}_proj.{kind}"][place] for part, place in rows]
            )
            assert torch.equal(found[f"layers.1.self_attn.qkv_proj.{kind}"], expected)
        assert torch.equal(
            found["layers.1.self_attn.o_proj.weight"],
            stored[f"{layer}.self_attn.o_proj.weight"][:, q],
        )
        gate, up = stored[f"{layer}.mlp.gate_up_proj.weight"].chunk(2)
        inner = slice(80 * rank, 80 * rank + 80)
        assert torch.equal(
            found["layers.1.mlp.gate_up_proj.weight"], torch.cat([gate[inner], up[inner]])
        )
        assert torch.equal(
            found["layers.1.mlp.down_proj.weight"],
            stored[f"{layer}.mlp.down_proj.weight"][:, inner],
        )
        vocabulary = slice(128 * rank, 128 * rank + 128)
        assert torch.equal(
            found["embed_tokens.weight"], stored["model.embed_tokens.weight"][vocabulary]
        )
        assert torch.equal(found["lm_head"], stored["lm_head.weight"][vocabulary])


def test_no_more_is_read_than_a_ranks_part(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import glm_batch.models.checkpoint.weights

    path, values = make_checkpoint("glm4"), 0
    read = glm_batch.models.checkpoint.weights._read

    def counting(*arguments: Any) -> Any:
        nonlocal values
        pieces = read(*arguments)
        values += sum(tensor.numel() for tensor, _ in pieces)
        return pieces

    monkeypatch.setattr(glm_batch.models.checkpoint.weights, "_read", counting)
    parameters = loaded(path, 3, 4)
    assert values == sum(tensor.numel() for tensor in parameters.values())
    assert values < load_config(path).num_parameters * 0.3


def test_a_tied_head_is_the_embeddings_part(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Stored a second time it is compared, part by part."""
    path = make_checkpoint("glm", "mha")
    found = loaded(path, 1, 2)
    assert found["lm_head"].data_ptr() == found["embed_tokens.weight"].data_ptr()

    def store_again(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1] += 1

    twice = rewritten(path, tmp_path / "twice", store_again)
    loaded(twice, 0, 2)
    with pytest.raises(ConfigError, match="differs from the one"):
        loaded(twice, 1, 2)


@pytest.mark.parametrize("size", [3, 5, 16])
def test_what_cannot_be_dealt_is_refused(make_checkpoint: MakeCheckpoint, size: int) -> None:
    with pytest.raises(
        ConfigError,
        match=f"tensor_parallel_size={size}: .* 8 attention heads, 2 kv heads .*1, 2, 4, 8$",
    ):
        check_parts(load_config(make_checkpoint("glm4")), size)


def test_a_single_process_refuses_to_be_several_ranks(make_checkpoint: MakeCheckpoint) -> None:
    config = EngineConfig(model=str(make_checkpoint("glm4")), tensor_parallel_size=2)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size=2: a single process is one rank; set it to 1"
    ):
        TorchEngine.from_checkpoint(config)


def test_work_is_dealt_evenly() -> None:
    assert dealt([5, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1]
    assert dealt([], 3) == []
    assert sorted(dealt([2, 2, 2], 3)) == [0, 1, 2]


def test_parts_cover_everything_once() -> None:
    def covered(part: Callable[[ParallelGroup], Any], size: int) -> list[int]:
        parts = [part(Alone(rank, size)) for rank in range(size)]
        return [index for each in parts for index in range(each.start, each.start + each.size)]

    assert covered(lambda group: group.part(12), 4) == list(range(12))
    assert covered(lambda group: group.padded_part(10), 4) == list(range(10))
    assert covered(lambda group: group.padded_part(9), 4) == list(range(9))
    assert covered(lambda group: group.kv_part(2), 2) == [0, 1]
    assert covered(lambda group: group.kv_part(2), 8) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_steps_that_no_rank_has_memory_for_are_tried_smaller(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, requests = make_checkpoint("glm4"), text_requests(GREEDY, CHOOSE, Embed())
    expected = run(
        TorchEngine.from_checkpoint(EngineConfig(model=str(path), kv_cache_tokens=4096)), requests
    )
    run_step, refused = TorchRunner.run, []

    def full(self: TorchRunner, batch: Batch) -> StepOutput:
        output = run_step(self, batch)
        if len(batch.input_ids) > 40:
            refused.append(len(batch.input_ids))
            raise RuntimeError("CUDA out of memory")
        return output

    monkeypatch.setattr(TorchRunner, "run", full)
    with parallel_engine(path, 2) as engine:
        assert_same(run(engine, requests), expected)
    assert len(refused) >= 4


@pytest.mark.parametrize(
    ("exchanges", "agreed"), [((2, 2), True), ((2, 3), False), ((2, None), False)]
)
def test_ranks_are_in_step_where_all_failed_before_the_same_exchange(
    monkeypatch: pytest.MonkeyPatch, exchanges: tuple[int, int | None], agreed: bool
) -> None:
    monkeypatch.setattr(
        "glm_batch.models.network.layers.parallel.MEET_TIMEOUT", timedelta(seconds=0.3)
    )
    meeting = Rendezvous()
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(join, meeting.host, meeting.port, rank=1, size=2, backend="gloo")
        groups = [meeting.join(2, "gloo"), other.result()]
        answers = []
        for group, count in zip(groups, exchanges, strict=True):
            if count is not None:
                group._num_exchanges = count
                answers.append(threads.submit(group.in_step))
        assert [answer.result() for answer in answers] == [agreed] * len(answers)
