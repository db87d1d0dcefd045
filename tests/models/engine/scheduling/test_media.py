"""Images and videos in the engine: however they are batched, cut, cached or sampled, the numbers
stay the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_batch.models.byte_cache import ByteCache
from glm_batch.models.engine import (
    Choose,
    Completion,
    EngineConfig,
    Generate,
    Inspect,
    Media,
    Request,
    SamplingParams,
    Work,
)
from glm_batch.models.engine.execution.media_encoder import ENTRY_BYTES
from glm_batch.models.engine.torch_engine import TorchEngine
from tests.models.conftest import MakeCheckpoint, random_ids
from tests.models.media_cases import (
    IMAGE,
    MakeGlm4v,
    Part,
    Prompt,
    load_glm4v,
    make_glm4v,
    make_item,
    make_prompt,
    oracle_hidden,
    oracle_logits,
    rope_index,
)

__all__ = ["make_glm4v"]  # a fixture

ATOL = 5e-5
GREEDY = Generate(sampling=SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1))
SAMPLED = Generate(
    sampling=SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, n=2, logprobs=1)
)
CHOOSE = Choose(choices=((5,), (5, 6), (7, 8, 9), (7, 8, 10)), count_end=True)
PARTS: list[list[Part]] = [
    [9, (1, 6, 4), 3],
    [4, [(3, 4, 4)], 2],
    [21],
    [9, (1, 4, 4), 2, [(2, 2, 6)], 1, (1, 8, 2), 5],
    [1, (1, 10, 6), 2],
]
PROMPTS = [make_prompt(parts, seed=i) for i, parts in enumerate(PARTS)]


@pytest.fixture(scope="module")
def path(make_glm4v: MakeGlm4v) -> Path:
    return make_glm4v()


def build(path: Path, **config: Any) -> TorchEngine:
    return TorchEngine.from_checkpoint(
        EngineConfig(model=str(path), **({"kv_cache_tokens": 2048} | config))
    )


def encoded(engine: TorchEngine) -> int:
    """Items that went through the vision tower."""
    encoder = engine._runner.encoder  # type: ignore[attr-defined]
    return int(encoder.num_encoded)


def request(name: str, prompt: Prompt, work: Work = GREEDY) -> Request:
    return Request(id=name, input_ids=prompt.ids, work=work, media=prompt.media)


def run(engine: TorchEngine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
        engine.scheduler.blocks.check()
    assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
    return done


def assert_same(got: Completion, want: Completion) -> None:
    assert got.error is None
    assert got.media_tokens == want.media_tokens
    for ours, theirs in zip(got.outputs, want.outputs, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs or [], theirs.logprobs or [], atol=ATOL)
    np.testing.assert_allclose(got.choice_logprobs or [], want.choice_logprobs or [], atol=ATOL)
    if want.array is not None:
        np.testing.assert_allclose(got.array, want.array, atol=ATOL)


WORKS: dict[str, Work] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "choose": CHOOSE,
    "hidden": Inspect(what="hidden_states"),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "together": {},
    "cut inside images": {"max_step_tokens": 7},
    "one token steps": {"max_step_tokens": 1, "max_num_seqs": 2},
    "no prefix cache": {"prefix_caching": False},
    "large blocks": {"block_size": 32},
    "no room for features": {"media_cache_bytes": 1, "max_step_tokens": 7},
    "preempted": {"kv_cache_tokens": 96, "block_size": 4},
}


@pytest.fixture(scope="module")
def one_by_one(path: Path) -> dict[str, list[Completion]]:
    """Every request alone in a fresh engine: nothing is shared, cut or remembered."""
    return {
        name: [
            run(build(path, prefix_caching=False), [request("r", p, work)])["r"] for p in PROMPTS
        ]
        for name, work in WORKS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("work", WORKS)
def test_every_layout_gives_what_one_by_one_gives(
    path: Path, one_by_one: dict[str, list[Completion]], work: str, layout: str
) -> None:
    engine = build(path, **LAYOUTS[layout])
    found = run(engine, [request(str(i), prompt, WORKS[work]) for i, prompt in enumerate(PROMPTS)])
    for i, want in enumerate(one_by_one[work]):
        assert_same(found[str(i)], want)
    if layout == "preempted" and work == "greedy":
        assert engine.scheduler.num_preemptions > 0
    if layout == "cut inside images":
        assert encoded(engine) == sum(len(prompt.items) for prompt in PROMPTS)


@pytest.mark.parametrize("max_step_tokens", [1024, 5])
def test_logits_equal_the_oracle_however_an_image_is_cut(path: Path, max_step_tokens: int) -> None:
    engine = build(path, max_step_tokens=max_step_tokens)
    prompt = PROMPTS[3]
    array = run(engine, [request("r", prompt, Inspect())])["r"].array
    assert array is not None
    np.testing.assert_allclose(array, oracle_logits(load_glm4v(path), prompt), atol=1e-4, rtol=0)


def test_generated_tokens_stand_where_the_prompts_media_end(path: Path) -> None:
    """Greedy continuation against whole forwards whose positions go on from length + rope_delta."""
    oracle = load_glm4v(path)
    prompt = PROMPTS[0]
    assert prompt.media is not None
    assert prompt.media.rope_delta < 0
    engine = build(path)
    engine.tokenizer.vocab_size = engine.config.vocab_size
    output = run(engine, [request("r", prompt)])["r"].outputs[0]
    ids, types = list(prompt.ids), list(prompt.types)
    for token in output.token_ids:
        so_far = Prompt(ids, types, prompt.items, rope_index(types, prompt.items, 2))
        with torch.no_grad():
            assert int(oracle.lm_head(oracle_hidden(oracle, so_far)[-1]).argmax()) == token
        ids, types = [*ids, token], [*types, 0]


def test_choices_after_media_equal_whole_forwards(path: Path) -> None:
    oracle = load_glm4v(path)
    prompt = PROMPTS[3]
    found = run(build(path), [request("r", prompt, replace(CHOOSE, count_end=False))])[
        "r"
    ].choice_logprobs
    expected = []
    for choice in CHOOSE.choices:
        types = prompt.types + [0] * len(choice)
        whole = Prompt(
            prompt.ids + list(choice), types, prompt.items, rope_index(types, prompt.items, 2)
        )
        logprobs = torch.from_numpy(oracle_logits(oracle, whole)).double().log_softmax(-1)
        expected.append(
            sum(float(logprobs[len(prompt.ids) - 1 + i, token]) for i, token in enumerate(choice))
        )
    np.testing.assert_allclose(found, expected, atol=1e-4)


# The two caches


def test_the_same_text_with_another_image_is_another_prompt(path: Path) -> None:
    """Placeholders have equal ids: without the digest in its key the second prompt would read the
    first one's image.
    """
    engine = build(path, block_size=4)
    first, other = (make_prompt([9, (1, 6, 4), 3], seed=7) for _ in range(2))
    other.items[0] = make_item(99, (1, 6, 4))
    assert first.ids == other.ids
    run(engine, [request("first", first)])
    again, differs = (run(engine, [request("r", prompt)])["r"] for prompt in (first, other))
    assert again.cached_tokens == (len(first.ids) - 1) // 4 * 4
    assert differs.cached_tokens == 8  # the text before the image, in whole blocks
    assert_same(replace(differs, cached_tokens=0), run(build(path), [request("r", other)])["r"])


def test_equal_bytes_in_another_grid_are_another_image(path: Path) -> None:
    engine = build(path, block_size=4)
    first, turned = make_prompt([9, (1, 6, 4), 3], seed=7), make_prompt([9, (1, 4, 6), 3], seed=7)
    turned.items[0] = replace(first.items[0], grid_thw=(1, 4, 6))
    assert first.ids == turned.ids
    run(engine, [request("first", first)])
    assert run(engine, [request("r", turned)])["r"].cached_tokens == 8
    assert encoded(engine) == 2


def test_an_item_is_encoded_once_while_it_is_remembered(path: Path) -> None:
    engine = build(path)
    prompts = [make_prompt([i, (1, 6, 4), 3 + i], seed=7) for i in range(1, 5)]
    prompts = [replace(prompt, items=prompts[0].items) for prompt in prompts]
    run(engine, [request(str(i), prompt) for i, prompt in enumerate(prompts[:3])])
    assert encoded(engine) == 1
    remembered = run(engine, [request("r", prompts[3], Inspect())])["r"]
    assert encoded(engine) == 1
    assert_same(remembered, run(build(path), [request("r", prompts[3], Inspect())])["r"])


def test_features_beyond_the_budget_are_forgotten_oldest_first(path: Path) -> None:
    size = 6 * 128 * 4 + ENTRY_BYTES  # of an image of 6 x 4 patches
    engine = build(path, media_cache_bytes=2 * size, prefix_caching=False)
    prompts = [make_prompt([3, (1, 6, 4), 3], seed=i) for i in range(3)]
    counts = []
    for i in (0, 1, 0, 2, 0, 1):
        run(engine, [request("r", prompts[i])])
        counts.append(encoded(engine))
    assert counts == [1, 2, 2, 3, 3, 4]


def test_a_cached_image_is_not_encoded(path: Path) -> None:
    engine = build(path, block_size=1, media_cache_bytes=1)
    filler = make_prompt([2, (1, 2, 2), 2], seed=50)
    run(engine, [request("a", PROMPTS[0])])
    run(engine, [request("b", filler)])  # drives the first image's features out
    completion = run(engine, [request("c", PROMPTS[0])])["c"]
    assert completion.cached_tokens == len(PROMPTS[0].ids) - 1
    assert encoded(engine) == 2


def test_many_frames_go_through_the_tower_in_several_passes(
    path: Path, one_by_one: dict[str, list[Completion]]
) -> None:
    engine = build(path)
    engine._runner.encoder._max_patches = 20  # type: ignore[attr-defined]  # two of the smaller frames, one larger
    found = run(
        engine, [request(str(i), prompt, WORKS["hidden"]) for i, prompt in enumerate(PROMPTS)]
    )
    for i, want in enumerate(one_by_one["hidden"]):
        assert_same(found[str(i)], want)


def test_media_that_do_not_fit_together_are_encoded_apart(
    path: Path, one_by_one: dict[str, list[Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(path)
    encoder = engine._runner.encoder  # type: ignore[attr-defined]
    forward = encoder._tower.forward_uint8

    def full(patches: list[torch.Tensor], grids: list[Any]) -> torch.Tensor:
        if len(grids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(patches, grids)  # type: ignore[no-any-return]

    monkeypatch.setattr(encoder._tower, "forward_uint8", full)
    found = run(
        engine, [request(str(i), prompt, WORKS["hidden"]) for i, prompt in enumerate(PROMPTS)]
    )
    for i, want in enumerate(one_by_one["hidden"]):
        assert_same(found[str(i)], want)


def test_byte_cache_books() -> None:
    cache: ByteCache[str] = ByteCache(10)
    for key, size in (("a", 4), ("b", 4), ("a", 5), ("c", 4)):
        cache.put(key, key, size)
    assert [cache.get(key) for key in "abc"] == ["a", None, "c"]
    assert (cache.num_bytes, len(cache)) == (9, 2)
    cache.put("large", "large", 99)
    assert (cache.get("large"), cache.num_bytes, len(cache)) == ("large", 99, 1)
    cache.put("d", "d", 1)
    assert (cache.get("large"), cache.num_bytes, len(cache)) == (None, 1, 1)


# What is refused


def refusal(path: Path, prompt: Prompt, media: Media | None) -> str:
    found = run(build(path), [Request(id="r", input_ids=prompt.ids, work=GREEDY, media=media)])["r"]
    assert found.error is not None
    return str(found.error)


def test_placeholders_and_features_must_agree(path: Path) -> None:
    prompt = PROMPTS[3]
    media = prompt.media
    assert media is not None
    fewer = replace(media, items=media.items[1:])
    assert (
        refusal(path, prompt, fewer)
        == "[media_mismatch] the prompt has 8 image tokens, its 1 images give 4 features"
    )
    no_video = replace(media, items=media.items[:1] + media.items[2:])
    assert "the prompt has 6 video frame tokens, its 0 videos give 0 features" in refusal(
        path, prompt, no_video
    )
    assert "the prompt has 8 image tokens, its 0 images give 0 features" in refusal(
        path, prompt, None
    )


def test_images_in_another_order_than_their_placeholders_are_refused(path: Path) -> None:
    prompt = make_prompt([3, (1, 2, 2), 3, (1, 6, 4), 3])
    assert prompt.media is not None
    swapped = replace(prompt.media, items=prompt.media.items[::-1])
    assert "media must stand in the order of their placeholders" in refusal(path, prompt, swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_thw": (1, 3, 8)}, "the image's grid is (1, 3, 8); it must be"),
        ({"grid_thw": (2, 6, 2)}, "1 frame for an image"),
        ({"grid_thw": (1, 6, 6)}, "the image's patches are uint8 [24, 108]"),
        ({"patches": np.zeros((24, 108), np.float32)}, "the image's patches are float32 [24, 108]"),
        ({"kind": "video"}, "the checkpoint ask for uint8 [24, 216]"),
    ],
)
def test_broken_items_are_refused(path: Path, change: dict[str, Any], message: str) -> None:
    prompt = PROMPTS[0]
    item = replace(prompt.items[0], **change)
    refused = refusal(path, prompt, Media(items=(item,), positions=prompt.positions))
    assert refused.startswith("[invalid_media] ")
    assert message in refused


@pytest.mark.parametrize(
    "positions",
    [
        np.zeros((3, 4), np.int64),
        np.zeros((3, 20), np.int32),
        np.full((3, 20), -1),
        np.full((3, 20), 20),
    ],
)
def test_broken_positions_are_refused(path: Path, positions: np.ndarray) -> None:
    prompt = PROMPTS[0]
    assert len(prompt.ids) == 20
    assert "[invalid_media] the positions" in refusal(
        path, prompt, Media(items=tuple(prompt.items), positions=positions)
    )


def test_a_text_model_refuses_media(make_checkpoint: MakeCheckpoint) -> None:
    prompt = PROMPTS[0]
    assert "[unsupported_media]" in refusal(make_checkpoint("glm4"), prompt, prompt.media)


def test_placeholder_ids_mean_nothing_to_a_text_model(make_checkpoint: MakeCheckpoint) -> None:
    done = run(
        build(make_checkpoint("glm4")),
        [Request(id="r", input_ids=[*random_ids(1, 5), IMAGE], work=GREEDY)],
    )
    assert done["r"].error is None
