"""Constrained outputs of a model with random logits: always valid, and ended exactly where the
grammar may end.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from glm_batch.models.engine.api.request import Constraint, SamplingParams
from glm_batch.models.engine.decoding.constraints import Constraints, Matcher
from glm_batch.models.engine.execution.sampler import SampleRow, sample
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.tokenizer import Tokenizer

CORPUS = [
    '{"order_id": "A-1001", "reason": "damaged", "days": 12, "items": [true, false, null]}\n',
    "你好，世界 café ",
]

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"order_id": {"type": "string", "pattern": "^[A-Z]-[0-9]{4}$"}},
        "required": ["order_id"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "reason": {"enum": ["damaged", "late", "破损", 'a "quoted" one']},
            "days": {"type": "integer", "minimum": 0, "maximum": 30},
            "open": {"type": "boolean"},
        },
        "required": ["reason", "days", "open"],
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {"type": ["integer", "null"], "minimum": -5, "maximum": 5},
        "minItems": 1,
        "maxItems": 4,
    },
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "inner": {"$ref": "#/$defs/point"},
        },
        "required": ["inner"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"const": 1.5}, "on": {"type": "string", "format": "date"}},
                "required": ["x", "on"],
                "additionalProperties": False,
            }
        },
    },
    {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 4}, {"type": "boolean"}]},
]

REGEXES = [
    r"[A-Z]{2}-[0-9]{3,5}",
    r"(circle|square|triangle)",
    r"(ab|abc|abcd)",
    r"(yes|no)( because [a-z ]{3,20}\.)?",
    r"a*b?",
    r"[一-龥]{2,4}，(café|世界)",
    r"#[^\n]{0,10}\n",
    r"(<think>x</think>)?y{1,3}",
]  # fmt: skip


def build_tokenizer(*, has_eos: bool = True) -> Tokenizer:
    """A byte-level BPE of 330 tokens; one of its EOS tokens is, as GLM-4.1V's, ordinary text to the
    library.
    """
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False),
    )
    raw.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<|endoftext|>", "<|user|>", "[MASK]")]
    )
    raw.add_tokens(
        [AddedToken(token, normalized=False) for token in ("<think>", "</think>", "</answer>")]
    )
    ends = [raw.token_to_id(token) for token in ("<|endoftext|>", "<|user|>", "</answer>")]
    return Tokenizer(raw, eos_token_ids=ends if has_eos else ())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer)


def schema_of(schema: dict[str, Any]) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(schema, ensure_ascii=False))


def regex_of(text: str) -> Constraint:
    return Constraint(kind="regex", text=text)


def allowed_ids(matcher: Matcher) -> list[int]:
    return np.unpackbits(matcher.bitmask().view(np.uint8), bitorder="little").nonzero()[0].tolist()


def feed(matcher: Matcher, tokenizer: Tokenizer, text: str) -> Matcher:
    for id in tokenizer.encode(text):
        matcher.accept(id)
    return matcher


def generate(matcher: Matcher, tokenizer: Tokenizer, seed: int, *, jump: bool = False) -> str:
    """Text from random logits through the real sampler, until EOS or until nothing but EOS may
    follow.
    """
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=2000)
    ids: list[int] = []
    while not matcher.is_done:
        assert len(ids) < 2000, tokenizer.decode(ids)
        forced = matcher.forced_tokens() if jump else []
        if not forced:
            row = SampleRow(params=params, prompt_ids=(), output_ids=ids, bitmask=matcher.bitmask())
            logits = 3 * torch.randn(1, tokenizer.vocab_size + 7, generator=generator)
            sampled = sample(logits, [row], vocab_size=tokenizer.vocab_size)
            assert not sampled.errors
            forced = sampled.token_ids
        for id in forced:
            matcher.accept(id)
            if id in tokenizer.eos_token_ids:
                return tokenizer.decode(ids, skip_special_tokens=False)
            ids.append(id)
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_random_outputs_are_valid_json(
    schema: dict[str, Any], jump: bool, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    texts = {
        generate(constraints.start(schema_of(schema)), tokenizer, seed, jump=jump)
        for seed in range(12)
    }
    assert len(texts) > 3, "random logits lead to different outputs"
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("pattern", REGEXES)
def test_random_outputs_match_the_regex(
    pattern: str, jump: bool, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    texts = {
        generate(constraints.start(regex_of(pattern)), tokenizer, seed, jump=jump)
        for seed in range(25)
    }
    assert len(texts) > 1
    assert not [text for text in texts if not re.fullmatch(pattern, text)]


@pytest.mark.parametrize("pattern", REGEXES)
def test_eos_is_allowed_exactly_where_the_regex_matches(
    pattern: str, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    for seed in range(10):
        choose = random.Random(seed)
        matcher, ids = constraints.start(regex_of(pattern)), []
        while not matcher.is_done:
            allowed = allowed_ids(matcher)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            matches = re.fullmatch(pattern, text) is not None
            assert matcher.may_stop == matches
            assert [id in allowed for id in tokenizer.eos_token_ids] == [matches] * 3
            going_on = [id for id in allowed if id not in tokenizer.eos_token_ids]
            assert going_on, text
            ids.append(choose.choice(going_on))
            matcher.accept(ids[-1])
        assert allowed_ids(matcher) == sorted(tokenizer.eos_token_ids)


def test_eos_is_allowed_exactly_where_the_json_is_complete(
    constraints: Constraints, tokenizer: Tokenizer
) -> None:
    for seed, schema in enumerate(SCHEMAS * 3):
        choose = random.Random(seed)
        matcher, ids = constraints.start(schema_of(schema)), []
        while not matcher.is_done:
            allowed = allowed_ids(matcher)
            complete = is_json(tokenizer.decode(ids), schema)
            assert [id in allowed for id in tokenizer.eos_token_ids] == [complete] * 3
            ids.append(choose.choice([id for id in allowed if id not in tokenizer.eos_token_ids]))
            matcher.accept(ids[-1])
        assert is_json(tokenizer.decode(ids), schema)


def is_json(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@pytest.mark.parametrize("pattern", REGEXES[:5])
def test_the_mask_is_every_token_that_can_lead_to_a_match(
    pattern: str, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    """The oracle is partial matching; where the next tokens are forced, the mask holds the first of
    them alone.
    """
    plain = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id).isascii()]
    plain = [
        id for id in plain if id not in tokenizer.special_ids and tokenizer.decode([id])[0] != "<"
    ]
    for seed in range(6):
        choose = random.Random(seed)
        matcher, text = constraints.start(regex_of(pattern)), ""
        while not matcher.is_done:
            possible = [
                id
                for id in plain
                if regex.fullmatch(pattern, text + tokenizer.decode([id]), partial=True)
            ]
            ends = list(tokenizer.eos_token_ids) if matcher.may_stop else []
            forced = matcher.forced_tokens()
            assert allowed_ids(matcher) == (forced[:1] or sorted(possible + ends))
            assert set(forced[:1]) <= set(possible)
            id = choose.choice(forced[:1] or possible)
            matcher.accept(id)
            text += tokenizer.decode([id])


@pytest.mark.parametrize(
    ("constraint", "before", "forced"),
    [
        (regex_of("(circle|square)"), "", ""),
        (regex_of("(circle|square)"), "s", "quare"),
        (regex_of("(ab|abc)"), "", "ab"),
        (regex_of("(ab|abc)"), "ab", ""),
        (regex_of("x(café|cafés) 你好"), "xcafé ", "你好"),
        (schema_of({"const": {"order_id": "A-1"}}), "{", ""),
        (schema_of({"enum": ["damaged", "days"]}), '"dam', 'aged"'),
    ],
    ids=str,
)
def test_forced_tokens_are_the_only_way_on(
    constraint: Constraint, before: str, forced: str, constraints: Constraints, tokenizer: Tokenizer
) -> None:
    matcher = feed(constraints.start(constraint), tokenizer, before)
    tokens = matcher.forced_tokens()
    assert tokenizer.decode(tokens) == forced
    for token in tokens:
        assert allowed_ids(matcher) == [token]
        matcher.accept(token)


def test_control_tokens_never_appear_inside_text(
    constraints: Constraints, tokenizer: Tokenizer
) -> None:
    """`</answer>` ends GLM-4.1V's answer but is no special token: inside a string it would end the
    JSON.
    """
    matcher = feed(constraints.start(schema_of({"type": "string"})), tokenizer, '"ab')
    allowed = set(allowed_ids(matcher))
    control = {id for text in tokenizer.control_tokens for id in tokenizer.encode_control(text)}
    assert len(control) == 6
    assert not allowed & control
    assert set(tokenizer.encode("</answer>")) <= allowed


def test_whitespace_between_json_tokens_is_free_but_bounded(
    constraints: Constraints, tokenizer: Tokenizer
) -> None:
    schema = schema_of({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]})
    feed(constraints.start(schema), tokenizer, '{\n    "a": null\n}')
    blank = tokenizer.encode(" ")
    matcher = feed(constraints.start(schema), tokenizer, "{")
    accepted = 0
    while set(blank) <= set(allowed_ids(matcher)):
        matcher.accept(blank[0])
        accepted += 1
    assert accepted == 64


def test_copies_go_their_own_ways(constraints: Constraints, tokenizer: Tokenizer) -> None:
    first = feed(constraints.start(regex_of("a(b|cd)")), tokenizer, "a")
    second = first.copy()
    feed(first, tokenizer, "b")
    assert first.is_done
    assert not second.is_done
    assert feed(second, tokenizer, "cd").is_done


def test_each_constraint_is_compiled_once(tokenizer: Tokenizer) -> None:
    constraints = Constraints(tokenizer)
    feed(constraints.start(regex_of("ab")), tokenizer, "a")
    assert tokenizer.decode(constraints.start(regex_of("ab")).forced_tokens()) == "ab", (
        "a fresh start each time"
    )
    constraints.start(schema_of({"const": "ab"}))
    info = constraints._compiled.cache_info()
    assert (info.misses, info.hits) == (2, 1)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint(kind="regex", text="(a"), "unclosed group"),
        (Constraint(kind="regex", text="(?=a)b"), "look-around"),
        (Constraint(kind="regex", text=r"[^\x{0}-\x{10FFFF}]"), "no text at all"),
        (Constraint(kind="json_schema", text="{bad"), "it is not JSON"),
        (Constraint(kind="json_schema", text="[]"), "must be a JSON object"),
        (Constraint(kind="json_schema", text='{"type": "obj"}'), "Invalid type: obj"),
        (Constraint(kind="json_schema", text='{"not": {}}'), 'Unimplemented keys: ["not"]'),
        (
            Constraint(kind="json_schema", text='{"type": "integer", "minimum": 5, "maximum": 2}'),
            "Unsatisfiable",
        ),
    ],
    ids=str,
)
def test_an_unusable_constraint_is_refused_with_the_reason(
    constraint: Constraint, reason: str, constraints: Constraints
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        constraints.start(constraint)


def test_a_token_that_is_not_allowed_is_a_row_error(
    constraints: Constraints, tokenizer: Tokenizer
) -> None:
    matcher = constraints.start(regex_of("ab"))
    with pytest.raises(RowError, match="constraint"):
        feed(matcher, tokenizer, "x")
    assert not matcher.is_done
    assert not matcher.may_stop
    with pytest.raises(RowError, match="constraint"):
        matcher.bitmask()


def test_a_checkpoint_without_eos_cannot_be_constrained() -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        Constraints(build_tokenizer(has_eos=False))
