"""What every engine promises: exactly one completion for each request, whatever it asks and
whatever happens to it.

The first half holds for all engines alike; the second is about generated text, which only a model
can say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from glm_batch.models.engine import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Delta,
    Embed,
    Engine,
    EngineConfig,
    Generate,
    Inspect,
    Output,
    Request,
    SamplingParams,
    Score,
    Tag,
    Work,
    build_engine,
)
from glm_batch.models.engine.api.request import BATCH
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.engine.vllm.vllm_limits import is_installed
from glm_batch.models.processing.tokenizer import Tokenizer
from tests.models.conftest import MakeCheckpoint, load_oracle, random_ids
from tests.models.media_cases import MakeGlm4v, make_glm4v, make_item, make_prompt

__all__ = ["make_glm4v"]  # a fixture

MAX_MODEL_LEN = 64
PAST_ANY_END = {"ignore_eos": True}


def build_torch(path: Path, **config: Any) -> TorchEngine:
    small = {"max_model_len": MAX_MODEL_LEN, "kv_cache_tokens": 1024, "max_step_tokens": 16}
    return TorchEngine.from_checkpoint(EngineConfig(model=str(path), **(small | config)))


def build_echo(path: Path) -> EchoEngine:
    return EchoEngine(
        max_model_len=MAX_MODEL_LEN, tokenizer=Tokenizer.from_dir(str(path)), hidden_size=256
    )


def build_vllm(path: Path, **config: Any) -> Engine:
    """The vLLM engine of the session, or a new one for another checkpoint or configuration: it
    takes seconds.
    """
    key = (path, *sorted(config.items()))
    if key not in _vllm_engines:
        close_vllm()
        small = {"max_model_len": MAX_MODEL_LEN, "kv_cache_tokens": 4096}
        _vllm_engines[key] = build_engine(
            EngineConfig(model=str(path), kind="vllm", **(small | config))
        )
    return _vllm_engines[key]


def close_vllm() -> None:
    while _vllm_engines:
        _vllm_engines.popitem()[1].close()


def release(engine: Engine) -> None:
    """Closes an engine, or makes ready for the next test one that is kept."""
    if engine not in _vllm_engines.values():
        engine.close()
    drain(engine)


# Each is tested where it is installed: see `make test` and `make test-vllm`.
_vllm_engines: dict[Any, Engine] = {}
WITH_VLLM: dict[str, Callable[..., Engine]] = {"vllm": build_vllm} if is_installed() else {}
ENGINES: dict[str, Callable[..., Engine]] = {"torch": build_torch, "echo": build_echo} | WITH_VLLM
# those that have a model
WRITERS: dict[str, Callable[..., Any]] = {"torch": build_torch} | WITH_VLLM


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Iterator[Engine]:
    built = ENGINES[request.param](make_checkpoint("glm4"))
    yield built
    release(built)


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Iterator[Any]:
    """An engine with a model; its tokenizer's end ids may be changed."""
    built = WRITERS[request.param](make_checkpoint("glm4"))
    end_ids = built.tokenizer.eos_token_ids
    yield built
    built.tokenizer.eos_token_ids = end_ids
    release(built)


@pytest.fixture
def torch_engine(make_checkpoint: MakeCheckpoint) -> TorchEngine:
    return build_torch(make_checkpoint("glm4"))


def able(engine: Engine, name: str) -> str:
    """The name of the work, or of another one where an engine has to refuse it."""
    return "hidden" if name == "logits" and type(engine).__name__ == "VllmEngine" else name


def drain(engine: Engine) -> dict[str, Completion]:
    """Steps until nothing is left; no id may come back twice and no block of the cache may be lost."""
    done: dict[str, Completion] = {}
    for _ in range(1000):
        if not engine.has_work():
            break
        for completion in engine.step():
            assert completion.id not in done
            done[completion.id] = completion
        if isinstance(engine, TorchEngine):
            engine.scheduler.blocks.check()
    assert not engine.has_work()
    assert engine.step() == []
    if isinstance(engine, TorchEngine):
        assert engine.scheduler.blocks.num_free == engine.limits.num_blocks
    return done


def run(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    engine.submit(requests)
    done = drain(engine)
    assert set(done) == {request.id for request in requests}
    return done


def generate(**sampling: Any) -> Generate:
    return Generate(sampling=SamplingParams(**({"max_tokens": 8} | sampling)))


def request(id: str, work: Work, length: int = 20) -> Request:
    """Prompts of one length share their first half."""
    shared = length // 2
    return Request(
        id=id, input_ids=random_ids(1, shared) + random_ids(hash_of(id), length - shared), work=work
    )


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % 10_007


def works(engine: Engine) -> dict[str, Work]:
    return {name: work for name, work in WORKS.items() if able(engine, name) == name}


WORKS: dict[str, Work] = {
    "generate": generate(),
    "sampled": generate(temperature=1.0, seed=5, n=3, logprobs=2),
    "choose": Choose(choices=((5,), (5, 6), (7, 8, 9)), count_end=True),
    "embed": Embed(),
    "mean": Embed(pooling="mean", normalize=True),
    "hidden": Inspect(what="hidden_states"),
    "logits": Inspect(what="logits"),
    "score": Score(top=2),
}


# Every engine


def test_every_work_in_one_batch(engine: Engine) -> None:
    requests = [
        request(f"{name}-{length}", work, length)
        for length in (1, 20, 40)
        for name, work in works(engine).items()
    ]
    done = run(engine, requests)
    for asked in requests:
        assert_answers(asked, done[asked.id])


def assert_answers(asked: Request, got: Completion) -> None:
    assert got.error is None
    assert got.prompt_tokens == len(asked.input_ids)
    assert 0 <= got.cached_tokens <= got.prompt_tokens
    match asked.work:
        case Generate(sampling=params):
            assert len(got.outputs) == params.n
            assert got.output_tokens == sum(len(output.token_ids) for output in got.outputs)
            assert got.finish_reason == got.outputs[0].finish_reason
            for output in got.outputs:
                assert output.finish_reason in ("stop", "length")
                assert 1 <= len(output.token_ids) <= params.max_tokens
                assert (output.logprobs is not None) == (params.logprobs > 0)
                assert output.logprobs is None or len(output.logprobs) == len(output.token_ids)
        case Choose(choices=choices):
            assert got.finish_reason == "scored"
            assert got.choice_logprobs is not None
            assert len(got.choice_logprobs) == len(choices)
            assert 0 < np.exp(got.choice_logprobs).sum() <= 1 + 1e-6
        case Embed():
            assert_array(got, (256,))
        case Inspect(what="hidden_states"):
            assert_array(got, (len(asked.input_ids), 256))
        case Score(top=top):
            assert got.finish_reason == "scored"
            assert got.scores is not None
            assert len(got.scores.logprobs) == len(asked.input_ids) - 1
            if len(asked.input_ids) > 1:
                assert (
                    got.scores.top_ids.shape
                    == got.scores.top_logprobs.shape
                    == (len(asked.input_ids) - 1, top)
                )
        case Inspect():
            assert got.array is not None
            assert len(got.array) == len(asked.input_ids)


def assert_array(got: Completion, shape: tuple[int, ...]) -> None:
    assert got.finish_reason == "scored"
    assert got.array is not None
    assert (got.array.shape, got.array.dtype) == (shape, np.float32)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize(
    ("length", "code"),
    [
        (0, "empty_prompt"),
        (MAX_MODEL_LEN + 1, "prompt_too_long"),
        (MAX_MODEL_LEN * 40, "prompt_too_long"),
    ],
)
def test_a_prompt_that_cannot_run_ends_in_an_error(
    engine: Engine, work: str, length: int, code: str
) -> None:
    asked = WORKS[able(engine, work)]
    done = run(
        engine,
        [request("before", asked), request("bad", asked, length), request("after", generate())],
    )
    bad = done["bad"]
    assert (bad.finish_reason, bad.prompt_tokens, bad.outputs, bad.array) == (
        "error",
        length,
        (),
        None,
    )
    assert bad.error is not None
    assert bad.error.code == code
    assert done["before"].error is done["after"].error is None


def test_output_needs_room_for_one_token(engine: Engine) -> None:
    done = run(
        engine,
        [
            request("full", generate(), MAX_MODEL_LEN),
            request("room", generate(), MAX_MODEL_LEN - 1),
        ],
    )
    assert done["full"].error is not None
    assert done["full"].error.code == "prompt_too_long"
    assert done["room"].error is None


def test_aborted_requests_come_back_once(engine: Engine) -> None:
    engine.submit([request(name, work) for name, work in works(engine).items()])
    engine.abort(["choose", "sampled", "never seen", "choose"])
    engine.abort(["sampled"])
    done = drain(engine)
    assert set(done) == set(works(engine))
    aborted = {name for name, completion in done.items() if completion.finish_reason == "abort"}
    assert aborted == {"choose", "sampled"}
    for name in aborted:
        assert (done[name].error, done[name].choice_logprobs) == (None, None)
        assert done[name].prompt_tokens == 20
    engine.abort(["choose", "generate"])  # finished long ago
    assert not engine.has_work()


@pytest.mark.parametrize("steps", range(1, 8))
def test_abort_in_the_middle_of_work(engine: Engine, steps: int) -> None:
    """Some are prefilling, some decoding, some waiting, some done: each still comes back exactly
    once.
    """
    engine.submit(
        [request(f"{name}-{i}", work, 30) for i in range(3) for name, work in works(engine).items()]
    )
    done: dict[str, Completion] = {}
    for _ in range(steps):
        done |= {completion.id: completion for completion in engine.step()}
    victims = [f"{name}-{i}" for i in (0, 2) for name in works(engine)]
    engine.abort(victims)
    rest = drain(engine)
    assert not set(done) & set(rest)
    assert len(done) + len(rest) == 3 * len(works(engine))
    for name, completion in rest.items():
        assert completion.finish_reason == "abort" if name in victims else completion.error is None


def test_abort_of_everything_leaves_an_engine_that_works(engine: Engine) -> None:
    alone = run(engine, [request("a", generate())])["a"]
    engine.submit([request(f"x{i}", generate(max_tokens=30)) for i in range(20)])
    engine.step()
    engine.abort([f"x{i}" for i in range(20)])
    drain(engine)
    assert run(engine, [request("a", generate())])["a"].outputs == alone.outputs


def test_has_work_until_the_last_completion_is_out(engine: Engine) -> None:
    assert not engine.has_work()
    assert engine.step() == []
    engine.submit([])
    assert not engine.has_work()
    engine.submit([request("empty", generate(), 0)])
    assert engine.has_work()  # its error has to come back
    assert [completion.id for completion in engine.step()] == ["empty"]
    assert not engine.has_work()
    engine.submit([request("a", generate())])
    engine.abort(["a"])
    assert engine.has_work()
    assert [completion.finish_reason for completion in engine.step()] == ["abort"]
    assert not engine.has_work()


@pytest.mark.parametrize("work", WORKS)
def test_a_finished_id_may_be_used_again(engine: Engine, work: str) -> None:
    first, second = (run(engine, [request("a", WORKS[able(engine, work)])])["a"] for _ in range(2))
    assert_same_answer(first, second)


def assert_same_answer(first: Completion, second: Completion) -> None:
    """Cached prefixes may change the last bits."""
    assert [output.token_ids for output in first.outputs] == [
        output.token_ids for output in second.outputs
    ]
    assert [output.text for output in first.outputs] == [output.text for output in second.outputs]
    np.testing.assert_allclose(first.choice_logprobs or [], second.choice_logprobs or [], atol=1e-4)
    if first.array is not None:
        np.testing.assert_allclose(first.array, second.array, atol=1e-4)
    if first.scores is not None:
        assert second.scores is not None
        np.testing.assert_allclose(first.scores.logprobs, second.scores.logprobs, atol=1e-4)


def test_an_id_in_flight_is_refused(engine: Engine) -> None:
    engine.submit([request("a", generate()), request("b", Embed())])
    with pytest.raises(ValueError, match="'a' is in flight already"):
        engine.submit([request("a", Embed())])
    done = drain(engine)
    assert set(done) == {"a", "b"}
    assert len(done["a"].outputs) == 1  # the first of the two


@pytest.mark.parametrize("end", ["refused", "aborted"])
def test_an_id_is_in_flight_until_its_completion_is_out(engine: Engine, end: str) -> None:
    engine.submit([request("a", generate(), 0 if end == "refused" else 20)])
    if end == "aborted":
        engine.abort(["a"])
    with pytest.raises(ValueError, match="'a' is in flight already"):
        engine.submit([request("a", generate())])
    assert set(drain(engine)) == {"a"}


def test_work_can_be_added_while_other_work_runs(engine: Engine) -> None:
    done: dict[str, Completion] = {}
    for i, (name, work) in enumerate(works(engine).items()):
        engine.submit([request(name, work, 10 + i)])
        done |= {completion.id: completion for completion in engine.step()}
    done |= drain(engine)
    assert set(done) == set(works(engine))


def test_batch_requests_are_answered_as_online_ones_are(engine: Engine) -> None:
    online = [request(f"{name}-online", work, 20) for name, work in works(engine).items()]
    batch = [
        replace(each, id=each.id.replace("online", "batch"), priority=BATCH) for each in online
    ]
    engine.submit([each for pair in zip(batch, online, strict=True) for each in pair])
    done = drain(engine)
    for mine, other in zip(batch, online, strict=True):
        assert done[mine.id].error is None
        texts = [[output.token_ids for output in done[each.id].outputs] for each in (mine, other)]
        assert texts[0] == texts[1]
        assert done[mine.id].finish_reason == done[other.id].finish_reason


@pytest.mark.parametrize("name", ENGINES)
def test_close_ends_everything(make_checkpoint: MakeCheckpoint, name: str) -> None:
    path = make_checkpoint("glm4")
    engine = ENGINES[name](path)
    before = run(engine, [request("a", generate())])["a"]
    engine.submit([request("a", generate()), request("b", Embed(), 0)])
    engine.step()
    engine.submit([request("c", generate())])
    engine.close()
    assert not engine.has_work()
    engine.close()
    close_vllm()
    after = ENGINES[name](path)
    assert_same_answer(before, run(after, [request("a", generate())])["a"])
    release(after)


# Prompts with media, for every engine

SHOWN = make_prompt([5, (1, 4, 6), 3, [(3, 2, 4)], 4])
MEDIA_ENGINES: dict[str, Callable[[Path], Engine]] = {
    name: lambda path, name=name: build_engine(
        EngineConfig(model=str(path), kind=name, kv_cache_tokens=1024)
    )
    for name in ("torch", "echo")
} | WITH_VLLM


@pytest.mark.parametrize("name", MEDIA_ENGINES)
def test_media_tokens_are_counted(make_glm4v: MakeGlm4v, name: str) -> None:
    engine = MEDIA_ENGINES[name](make_glm4v())
    text = request("text", generate())
    shown = Request(id="shown", input_ids=SHOWN.ids, work=generate(), media=SHOWN.media)
    done = run(engine, [text, shown])
    counted = {id: (completion.error, completion.media_tokens) for id, completion in done.items()}
    assert counted == {"text": (None, 0), "shown": (None, 6 + 3 * 2)}
    release(engine)


@pytest.mark.parametrize("name", MEDIA_ENGINES)
@pytest.mark.parametrize("work", WORKS)
def test_an_answer_depends_on_the_media(make_glm4v: MakeGlm4v, name: str, work: str) -> None:
    engine = MEDIA_ENGINES[name](make_glm4v())
    other = replace(SHOWN, items=[make_item(99, (1, 4, 6)), *SHOWN.items[1:]])
    requests = [
        Request(id=id, input_ids=SHOWN.ids, work=WORKS[able(engine, work)], media=prompt.media)
        for id, prompt in (("a", SHOWN), ("again", SHOWN), ("b", other))
    ]
    done = run(engine, requests)
    assert_same_answer(done["a"], done["again"])
    with pytest.raises(AssertionError):
        assert_same_answer(done["a"], done["b"])
    release(engine)


@pytest.mark.parametrize("name", MEDIA_ENGINES)
def test_a_text_checkpoint_refuses_media(make_checkpoint: MakeCheckpoint, name: str) -> None:
    engine = MEDIA_ENGINES[name](make_checkpoint("glm4"))
    shown = Request(id="shown", input_ids=SHOWN.ids, work=generate(), media=SHOWN.media)
    done = run(engine, [shown, request("text", generate())])
    assert done["shown"].error is not None
    assert done["shown"].error.code == "unsupported_media"
    assert done["text"].error is None
    release(engine)


# Generated text


def outputs(engine: Any, work: Generate, length: int = 20) -> tuple[Output, ...]:
    return run(engine, [request("r", work, length)])["r"].outputs


def says(text: str, **sampling: Any) -> Generate:
    """A constraint that leaves the model exactly one thing to say, byte by byte (the tokenizer has
    no merges).
    """
    sampling = {"max_tokens": 40, "logprobs": 1} | sampling
    return Generate(
        sampling=SamplingParams(**sampling),
        constraint=Constraint(kind="regex", text=re.escape(text)),
    )


# with 0, forced tokens are not sampled but appended at once
@pytest.mark.parametrize("logprobs", [0, 1])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "Zürich 你好 🙂 end", None),
        (("你好",), "Zürich ", "你好"),
        (("🙂", "好"), "Zürich 你", "好"),
        ((" end", "end"), "Zürich 你好 🙂", " end"),
        (("Z",), "", "Z"),
        (("ende",), "Zürich 你好 🙂 end", None),
    ],
)
def test_text_ends_before_the_stop_string(
    writer: Any, logprobs: int, stop: tuple[str, ...], text: str, reason: str | None
) -> None:
    (output,) = outputs(writer, says("Zürich 你好 🙂 end", stop=stop, logprobs=logprobs))
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", reason)
    said = bytes(token_bytes(writer, output)).decode()
    assert said.startswith(text + (reason or ""))  # token_ids hold the stop string, too


def token_bytes(engine: Any, output: Output) -> bytes:
    return b"".join(map(engine.tokenizer.token_bytes, output.token_ids))


def test_a_character_cut_by_max_tokens_is_marked(writer: Any) -> None:
    (output,) = outputs(writer, says("aü", max_tokens=2))
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("a�", "length", 2)


def test_a_stop_token_ends_the_text_before_itself(writer: Any) -> None:
    (free,) = outputs(writer, generate(**PAST_ANY_END))
    stop = free.token_ids[5]
    (output,) = outputs(writer, generate(stop_token_ids=(stop,), **PAST_ANY_END))
    first = free.token_ids.index(stop)
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == token_bytes(writer, free)[:first].decode(errors="replace")


def test_end_ids_end_the_text_unless_ignored(writer: Any) -> None:
    (free,) = outputs(writer, generate(**PAST_ANY_END))
    assert (len(free.token_ids), free.finish_reason) == (8, "length")
    writer.tokenizer.eos_token_ids = (free.token_ids[0],)
    (output,) = outputs(writer, generate())
    assert (output.token_ids, output.text, output.finish_reason) == (free.token_ids[:1], "", "stop")
    assert output.stop_reason is None
    assert outputs(writer, generate(**PAST_ANY_END)) == (free,)


@pytest.mark.parametrize("min_tokens", [1, 3, 8])
def test_min_tokens_put_the_end_off(writer: Any, min_tokens: int) -> None:
    (free,) = outputs(writer, generate(**PAST_ANY_END))
    end = free.token_ids[0]
    writer.tokenizer.eos_token_ids = (end,)
    (output,) = outputs(
        writer, generate(min_tokens=min_tokens, stop_token_ids=(free.token_ids[1],))
    )
    assert min_tokens <= len(output.token_ids) <= 8
    assert not {end, free.token_ids[1]} & set(output.token_ids[: min_tokens - 1])


@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_max_tokens(writer: Any, max_tokens: int) -> None:
    (output,) = outputs(writer, generate(max_tokens=max_tokens, **PAST_ANY_END))
    assert (len(output.token_ids), output.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("name", WRITERS)
def test_seeds_give_the_same_tokens_in_a_crowd(make_checkpoint: MakeCheckpoint, name: str) -> None:
    """Whatever else is in the batch, however the steps fall, and though others share the prompt."""
    path = make_checkpoint("glm4")
    sampling = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20, **PAST_ANY_END}
    mine = Request(id="mine", input_ids=random_ids(1, 25), work=generate(seed=7, n=2, **sampling))
    alone = run(WRITERS[name](path), [mine])["mine"].outputs
    assert alone[0].token_ids != alone[1].token_ids
    crowd = [
        Request(id=f"c{i}", input_ids=random_ids(i % 3, 25), work=generate(seed=99 + i, **sampling))
        for i in range(12)
    ]
    for max_step_tokens in (7, 300):
        engine = WRITERS[name](path, max_step_tokens=max_step_tokens)
        together = run(engine, [*crowd[:6], mine, *crowd[6:]])
        assert together["mine"].outputs == alone
        assert len({completion.outputs[0].token_ids for completion in together.values()}) == len(
            together
        )


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3, "n": 2}]
)
def test_logprobs_are_the_oracles_log_softmax(
    make_checkpoint: MakeCheckpoint, writer: Any, sampling: dict[str, Any]
) -> None:
    """Of the model's own logits: before temperature, filters and penalties."""
    oracle = load_oracle(make_checkpoint("glm4"))
    asked = request("r", generate(logprobs=4, max_tokens=12, **PAST_ANY_END, **sampling))
    for output in run(writer, [asked])["r"].outputs:
        ids = torch.tensor([[*asked.input_ids, *output.token_ids]])
        with torch.no_grad():
            expected = oracle(ids).logits[0, len(asked.input_ids) - 1 : -1].double().log_softmax(-1)
        own = expected.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(output.logprobs, own, atol=1e-4)
        values, best = expected[:, : writer.tokenizer.vocab_size].topk(4)
        assert output.top_logprobs is not None
        assert [[top.token_id for top in tops] for tops in output.top_logprobs] == best.tolist()
        np.testing.assert_allclose(
            [[top.logprob for top in tops] for tops in output.top_logprobs], values, atol=1e-4
        )


SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["billing", "shipping"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "known": {"type": "boolean"},
    },
    "required": ["label", "count", "known"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("logprobs", [0, 1])
def test_constrained_outputs_match(
    make_checkpoint: MakeCheckpoint, name: str, logprobs: int
) -> None:
    engine = WRITERS[name](make_checkpoint("glm4"), max_model_len=512)
    sampling = SamplingParams(temperature=1.0, seed=2, n=3, max_tokens=400, logprobs=logprobs)
    pattern = r"[A-Z]{2}-[0-9]{4}(, (yes|nein))?"
    schema, regex = (
        Constraint(kind="json_schema", text=json.dumps(SCHEMA)),
        Constraint(kind="regex", text=pattern),
    )
    requests = [
        request(f"{constraint.kind}-{i}", Generate(sampling=sampling, constraint=constraint))
        for i in range(3)
        for constraint in (schema, regex)
    ]
    for id, completion in run(engine, [*requests, request("free", generate())]).items():
        for output in completion.outputs:
            if id.startswith("json"):
                jsonschema.validate(json.loads(output.text), SCHEMA)
            elif id.startswith("regex"):
                assert re.fullmatch(pattern, output.text)
            assert output.finish_reason == "stop" or id == "free"


@pytest.mark.parametrize(
    "constraint", [Constraint(kind="regex", text="("), Constraint(kind="json_schema", text="{")]
)
def test_an_unusable_constraint_is_its_requests_error(writer: Any, constraint: Constraint) -> None:
    done = run(
        writer, [request("bad", Generate(constraint=constraint)), request("good", generate())]
    )
    assert done["bad"].error is not None
    assert done["bad"].error.code == "invalid_constraint"
    assert done["good"].error is None


# What the checkpoint cannot do


@pytest.mark.parametrize(
    ("head", "work"),
    [
        ("ForCausalLM", Classify()),
        ("ForCausalLM", Tag()),
        ("ForSequenceClassification", generate()),
        ("ForSequenceClassification", Choose(choices=((1,),))),
        ("ForSequenceClassification", Inspect(what="logits")),
        ("ForSequenceClassification", Tag()),
        ("ForTokenClassification", Classify()),
        ("ForTokenClassification", generate()),
    ],
)
def test_a_head_that_the_checkpoint_lacks(
    make_checkpoint: MakeCheckpoint, head: str, work: Work
) -> None:
    engine = build_torch(make_checkpoint("glm4", head=head))
    done = run(engine, [request("bad", work), request("good", Embed())])
    assert done["bad"].error is not None
    assert done["bad"].error.code == "unsupported_work"
    assert f"Glm4{head}" in done["bad"].error.message
    assert_array(done["good"], (256,))


@pytest.mark.parametrize("token", [-1, 512, 1 << 40])
def test_ids_outside_the_vocabulary(writer: Any, token: int) -> None:
    bad = [
        Request(id="prompt", input_ids=[1, token], work=generate()),
        Request(id="choice", input_ids=[1, 2], work=Choose(choices=((1, token, 2),))),
    ]
    done = run(writer, [*bad, request("good", generate())])
    for asked in bad:
        error = done[asked.id].error
        assert error is not None
        assert error.code == "invalid_token"
    assert done["good"].error is None


# Too little memory for everybody


@pytest.mark.parametrize("work", ["mean", "hidden", "logits", "choose"])
def test_a_half_computed_prompt_that_loses_its_cache_is_right(
    make_checkpoint: MakeCheckpoint, work: str
) -> None:
    path = make_checkpoint("glm4")
    engine = build_torch(path, kv_cache_tokens=60, block_size=4, max_step_tokens=4)
    asked = request("late", WORKS[work], 40)
    early = request("early", generate(max_tokens=50, **PAST_ANY_END), 8)
    done = run(engine, [early, asked])
    assert done["late"].num_preemptions > 0
    assert_answers(asked, done["late"])
    assert_same_answer(done["late"], run(build_torch(path), [asked])["late"])


# What streaming requests gain on the way


@pytest.fixture(params=[False, True], ids=["alone", "crowded"])
def crowd(request: pytest.FixtureRequest) -> list[Request]:
    """Others beside the request at hand, so that steps fall elsewhere and caches are lost."""
    return (
        [globals()["request"](f"x{i}", generate(max_tokens=20), 30) for i in range(6)]
        if request.param
        else []
    )


def run_streaming(
    engine: Engine, requests: list[Request]
) -> tuple[dict[str, Completion], list[Delta]]:
    engine.submit(requests)
    done: dict[str, Completion] = {}
    gained: list[Delta] = []
    while engine.has_work():
        finished = engine.step()
        deltas = engine.deltas()
        assert not {delta.id for delta in deltas} & done.keys(), "a delta after the completion"
        gained += deltas
        done |= {completion.id: completion for completion in finished}
    assert engine.deltas() == []
    return done, gained


def assert_deltas_are_the_outputs(completion: Completion, gained: list[Delta]) -> None:
    for index, output in enumerate(completion.outputs):
        mine = [delta for delta in gained if (delta.id, delta.index) == (completion.id, index)]
        assert "".join(delta.text for delta in mine) == output.text
        assert sum((delta.token_ids for delta in mine), ()) == output.token_ids
        assert sum((delta.logprobs for delta in mine), ()) == (output.logprobs or ())
        assert sum((delta.top_logprobs for delta in mine), ()) == (output.top_logprobs or ())
        assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [
            output.finish_reason
        ]


STREAMED: dict[str, Generate] = {
    "greedy": generate(),
    "sampled": generate(temperature=1.0, seed=5, n=3, logprobs=2, max_tokens=20),
    "one": generate(max_tokens=1),
    "past any end": generate(max_tokens=30, **PAST_ANY_END),
}


@pytest.mark.parametrize("work", STREAMED)
def test_deltas_joined_are_the_outputs(engine: Engine, work: str, crowd: list[Request]) -> None:
    asked = replace(request("mine", STREAMED[work]), stream=True)
    done, gained = run_streaming(engine, [*crowd, asked])
    assert {delta.id for delta in gained} == {"mine"}
    assert_deltas_are_the_outputs(done["mine"], gained)
    assert_same_answer(done["mine"], run(engine, [request("mine", STREAMED[work])])["mine"])


def test_requests_that_fail_or_do_not_decode_stream_nothing(engine: Engine) -> None:
    asked = [
        replace(request("embed", Embed()), stream=True),
        replace(request("bad", generate(), 0), stream=True),
    ]
    done, gained = run_streaming(engine, asked)
    assert (set(done), gained) == ({"embed", "bad"}, [])


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_an_abort_ends_the_stream(engine: Engine, steps: int) -> None:
    """What has been handed out by then is what the request would have said."""
    asked = replace(request("mine", STREAMED["past any end"]), stream=True)
    (whole,) = run(engine, [asked])["mine"].outputs
    engine.deltas()
    engine.submit([asked])
    gained: list[Delta] = []
    for _ in range(steps):
        engine.step()
        gained += engine.deltas()
    engine.abort(["mine"])
    drain(engine)
    assert engine.deltas() == []
    assert whole.text.startswith("".join(delta.text for delta in gained))
    if isinstance(engine, TorchEngine):
        assert all(delta.finish_reason is None for delta in gained)


@pytest.mark.parametrize("logprobs", [0, 1])
@pytest.mark.parametrize(
    "stop", [(), ("你好",), ("🙂", "好"), ("ende", "d!"), ("ch 你?", "h 你好 x", "Zürz")]
)
def test_a_stream_shows_no_stop_string_and_no_half_character(
    torch_engine: TorchEngine, logprobs: int, stop: tuple[str, ...]
) -> None:
    asked = Request(
        id="r",
        input_ids=random_ids(1, 9),
        work=says("Zürich 你好 🙂 end", stop=stop, logprobs=logprobs),
        stream=True,
    )
    done, gained = run_streaming(torch_engine, [asked])
    assert_deltas_are_the_outputs(done["r"], gained)
    assert "\ufffd" not in "".join(delta.text for delta in gained)
    if logprobs and not stop:  # nothing is forced and nothing held back: characters come one by one
        assert [delta.text for delta in gained if delta.text] == [*"Zürich 你好 🙂 end"]
