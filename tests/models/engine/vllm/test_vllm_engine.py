"""VllmEngine against TorchEngine: same requests, same checkpoint, float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_batch.models.engine import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Embed,
    Engine,
    EngineConfig,
    Generate,
    Inspect,
    Request,
    SamplingParams,
    Score,
    Tag,
    Work,
    build_engine,
)
from glm_batch.models.errors import ConfigError
from tests.models.conftest import MakeCheckpoint, random_ids

LABEL_TOLERANCE = 1e-3
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["a", "bc"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["label", "count"],
    "additionalProperties": False,
}


def generate(constraint: Constraint | None = None, **sampling: Any) -> Generate:
    return Generate(
        sampling=SamplingParams(**({"max_tokens": 12} | sampling)), constraint=constraint
    )


WORKS: dict[str, Work] = {
    "greedy": generate(),
    "likeliest": generate(logprobs=3, ignore_eos=True),
    "stop": generate(stop=("\n", "a", "é"), max_tokens=40, ignore_eos=True),
    "penalties": generate(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, ignore_eos=True
    ),
    "least": generate(min_tokens=10),
    "copies": generate(n=2),
    "regex": generate(
        Constraint(kind="regex", text=r"[A-Z]{2}-[0-9]{4}(, (yes|nein))?"), max_tokens=40
    ),
    "open end": generate(Constraint(kind="regex", text="[a-z]+"), max_tokens=40),
    "json": generate(Constraint(kind="json_schema", text=json.dumps(SCHEMA)), max_tokens=80),
    "one token": Choose(choices=((5,), (7,), (9,))),
    "tree": Choose(choices=((5,), (5, 6), (7, 8, 9), (7, 8, 10)), count_end=True),
    "many": Choose(choices=tuple((i,) for i in range(200))),
    "score": Score(top=3),
    "score alone": Score(),
    "score part": Score(top=1, start=30),
    "embed": Embed(),
    "mean": Embed(pooling="mean", normalize=True),
    "hidden": Inspect(what="hidden_states"),
    "classify": Classify(),
    "tag": Tag(),
}
OF_HEAD = {
    "ForCausalLM": [name for name in WORKS if name not in ("classify", "tag")],
    "ForSequenceClassification": ["classify"],
    "ForTokenClassification": ["tag"],
}
CHECKPOINTS = [
    ("glm4", "gqa4", "ForCausalLM"),
    ("glm4", "mha", "ForCausalLM"),
    ("glm", "gqa4", "ForCausalLM"),
    ("glm4", "gqa4", "ForSequenceClassification"),
    ("glm4", "gqa4", "ForTokenClassification"),
]


def run(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done: list[Completion] = []
    while engine.has_work():
        done += engine.step()
    assert len(done) == len(requests)
    return {completion.id: completion for completion in done}


def both(
    path: Path, requests: list[Request], **config: Any
) -> Iterator[tuple[Request, Completion, Completion]]:
    """Each request, what TorchEngine makes of it, and what VllmEngine does."""
    answers = []
    for kind in ("torch", "vllm"):
        engine = build_engine(
            EngineConfig(
                model=str(path), kind=kind, max_model_len=256, kv_cache_tokens=4096, **config
            )
        )
        answers.append(run(engine, requests))
        engine.close()
    return ((request, answers[0][request.id], answers[1][request.id]) for request in requests)


@pytest.mark.parametrize(("family", "shape", "head"), CHECKPOINTS)
def test_every_work_gives_what_torch_gives(
    make_checkpoint: MakeCheckpoint, family: str, shape: str, head: str
) -> None:
    path = make_checkpoint(family, shape, head)
    shared = random_ids(1, 40)  # longer than a block of vLLM's
    requests = [
        Request(id=f"{name}-{i}", input_ids=shared + random_ids(i, 5 + 3 * i), work=WORKS[name])
        for name in OF_HEAD[head]
        for i in range(3)
    ]
    padded = Request(
        id="padded", input_ids=[*random_ids(3, 9), 256, 256], work=WORKS[OF_HEAD[head][0]]
    )
    for asked, expected, got in both(path, [*requests, padded]):
        assert_equal(asked, expected, got)


def assert_equal(asked: Request, expected: Completion, got: Completion) -> None:
    assert expected.error is got.error is None, asked.id
    assert (got.finish_reason, got.prompt_tokens) == (
        expected.finish_reason,
        expected.prompt_tokens,
    ), asked.id
    assert got.output_tokens == expected.output_tokens, asked.id
    assert 0 <= got.cached_tokens < len(asked.input_ids)
    for one, other in zip(expected.outputs, got.outputs, strict=True):
        assert (other.token_ids, other.text) == (one.token_ids, one.text), asked.id
        assert (other.finish_reason, other.stop_reason) == (one.finish_reason, one.stop_reason), (
            asked.id
        )
        np.testing.assert_allclose(other.logprobs or (), one.logprobs or (), atol=LABEL_TOLERANCE)
        tops = [[top.token_id for top in tops] for tops in one.top_logprobs or ()]
        assert [[top.token_id for top in tops] for tops in other.top_logprobs or ()] == tops
    np.testing.assert_allclose(
        got.choice_logprobs or (), expected.choice_logprobs or (), atol=LABEL_TOLERANCE
    )
    if expected.scores is not None:
        assert got.scores is not None
        np.testing.assert_array_equal(got.scores.top_ids, expected.scores.top_ids)
        for name in ("logprobs", "top_logprobs"):
            one, other = getattr(expected.scores, name), getattr(got.scores, name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            np.testing.assert_allclose(other, one, atol=LABEL_TOLERANCE)
    if expected.array is not None:
        assert got.array is not None
        assert (got.array.shape, got.array.dtype) == (expected.array.shape, np.float32)
        np.testing.assert_allclose(got.array, expected.array, atol=LABEL_TOLERANCE)


def test_two_ranks_give_what_one_gives(make_checkpoint: MakeCheckpoint) -> None:
    path = str(make_checkpoint("glm4"))
    names = ("likeliest", "tree", "json")
    requests = [Request(id=name, input_ids=random_ids(1, 40), work=WORKS[name]) for name in names]
    answers = []
    for kind, ranks in (("torch", 1), ("vllm", 2)):
        engine = build_engine(
            EngineConfig(model=path, kind=kind, max_model_len=256, tensor_parallel_size=ranks)
        )
        answers.append(run(engine, requests))
        engine.close()
    for asked in requests:
        assert_equal(asked, answers[0][asked.id], answers[1][asked.id])


@pytest.fixture(scope="module")
def vllm_engine(make_checkpoint: MakeCheckpoint) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(make_checkpoint("glm4")), kind="vllm", max_model_len=256, kv_cache_tokens=4096
    )
    engine = build_engine(config)
    yield engine
    engine.close()


def test_likeliest_tokens_are_told_beside_labels(vllm_engine: Engine) -> None:
    """vLLM 0.32 gives token 0 at -inf for them in every step that scores given ids as well."""
    asked = Request(id="w", input_ids=random_ids(1, 20), work=generate(logprobs=4, ignore_eos=True))
    alone = run(vllm_engine, [asked])["w"].outputs[0].top_logprobs
    scored = [
        Request(id=f"c{i}", input_ids=random_ids(i, 20), work=WORKS["tree"]) for i in range(4)
    ]
    found = run(vllm_engine, [*scored[:2], asked, *scored[2:]])
    assert found["w"].outputs[0].top_logprobs == alone
    assert all(found[each.id].choice_logprobs is not None for each in scored)


def test_labels_share_the_prompt(vllm_engine: Engine) -> None:
    """Forks of one prompt, and later prompts with the same beginning, do not compute its whole
    blocks again.
    """
    prompt = random_ids(99, 100)
    first = Request(id="first", input_ids=prompt, work=WORKS["tree"])
    later = Request(id="later", input_ids=[*prompt, 1, 2], work=WORKS["tree"])
    assert run(vllm_engine, [first])["first"].cached_tokens == 0
    assert run(vllm_engine, [later])["later"].cached_tokens == 96


def test_long_prompts_are_seeded_too(vllm_engine: Engine) -> None:
    """On a CPU vLLM 0.32 ends when a prompt with a seed is cut over several steps."""
    sampled = generate(temperature=1.0, seed=4, n=2)
    crowd = [Request(id=str(i), input_ids=random_ids(i, 200), work=sampled) for i in range(40)]
    done = run(vllm_engine, crowd)
    assert all(completion.error is None for completion in done.values())
    again = run(vllm_engine, crowd[:1])["0"]
    assert again.outputs == done["0"].outputs
    assert len({output.token_ids for output in again.outputs}) == 2


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (Inspect(what="logits"), "unsupported_work"),
        (Classify(), "unsupported_work"),
        (generate(temperature=3.0), "unsupported_sampling"),
        (generate(presence_penalty=5.0), "unsupported_sampling"),
        (generate(Constraint(kind="regex", text="ab"), min_tokens=3), "unsupported_sampling"),
        (generate(Constraint(kind="regex", text="(")), "invalid_constraint"),
    ],
)
def test_what_vllm_cannot_do_is_its_requests_error(
    vllm_engine: Engine, work: Work, code: str
) -> None:
    bad = Request(id="bad", input_ids=random_ids(1, 20), work=work)
    done = run(vllm_engine, [bad, Request(id="good", input_ids=random_ids(2, 20), work=generate())])
    assert done["bad"].error is not None
    assert done["bad"].error.code == code
    assert done["good"].error is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 4}, "multiples of 32"),
        ({"max_model_len": 4096}, "at most 1024 tokens"),
        ({"kv_cache_tokens": 64, "max_model_len": 512}, "vLLM cannot run"),
    ],
)
def test_settings_that_vllm_cannot_take(
    make_checkpoint: MakeCheckpoint, change: dict[str, Any], message: str
) -> None:
    build: Callable[[], Engine] = lambda: build_engine(  # noqa: E731
        EngineConfig(model=str(make_checkpoint("glm4")), kind="vllm", **change)
    )
    with pytest.raises(ConfigError, match=message):
        build()
