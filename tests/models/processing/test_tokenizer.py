"""The tokenizer against transformers on the same files, and what it adds: plain control strings,
bytes, pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.models.processing.conftest import (
    MEDIA_TOKENS,
    REASONING_TOKENS,
    SPECIAL_TOKENS,
    build_tokenizer,
    write_checkpoint,
)

PIECES = [
    "Which", " shape", "circle", "你好", "，世界", "😀", "👩\u200d👧", "é", "e\u0301", "\u3000", " ", "  ", "\n",
    "\r\n", "\t", "123456", "<", "[", "<|", "|>", "<b>", "don't", "\x00", "\ufffd", "\u200b", "ﬁ", "\U00013000",
]  # fmt: skip
plain_text = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
any_text = st.lists(
    st.sampled_from(PIECES + SPECIAL_TOKENS + MEDIA_TOKENS + REASONING_TOKENS), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("glm41v")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(str(folder))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(text=any_text)
def test_template_text_has_the_ids_of_transformers(
    text: str, tokenizer: Tokenizer, oracle: Callable[..., dict]
) -> None:
    assert tokenizer.encode_control(text) == oracle(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None)
@given(text=any_text)
def test_split_control_cuts_where_the_library_cuts(text: str, tokenizer: Tokenizer) -> None:
    pieces = tokenizer.split_control(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert encode_pieces(tokenizer, text) == tokenizer.encode_control(text)


def encode_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    pieces = tokenizer.split_control(text)
    return [
        i for piece, id in pieces for i in ([id] if id is not None else tokenizer.encode(piece))
    ]


@settings(deadline=None)
@given(text=any_text)
def test_plain_text_is_bytes_whatever_it_says(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(id) for id in ids) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    control = {id for token in tokenizer.control_tokens for id in tokenizer.encode_control(token)}
    assert len(control) == len(SPECIAL_TOKENS + MEDIA_TOKENS + REASONING_TOKENS)
    assert not control & set(ids)


@pytest.mark.parametrize("adds_prefix", [False, True])
def test_raw_text_follows_the_post_processor(adds_prefix: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "glm4_0414", adds_prefix=adds_prefix)
    tokenizer, oracle = (
        Tokenizer.from_dir(str(folder)),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    prefix = (
        [tokenizer.encode_control(token)[0] for token in ("[gMASK]", "<sop>")]
        if adds_prefix
        else []
    )

    @settings(deadline=None)
    @given(text=plain_text)
    def check(text: str) -> None:
        if any(token in text for token in SPECIAL_TOKENS):
            return
        wanted = oracle(text, return_offsets_mapping=True)
        ids, offsets = tokenizer.encode_raw_with_offsets(text)
        assert ids == tokenizer.encode_raw(text) == wanted["input_ids"]
        assert offsets == wanted["offset_mapping"]
        assert ids == prefix + tokenizer.encode(text)
        assert offsets[: len(prefix)] == [(0, 0)] * len(prefix)

    check()
    assert tokenizer.encode_raw("<|user|>") == prefix + tokenizer.encode("<|user|>")


@settings(deadline=None)
@given(text=any_text)
def test_offsets_are_spans_of_characters(text: str, tokenizer: Tokenizer) -> None:
    """A token's bytes lie within its characters; together the spans cover the text in order."""
    ids, offsets = tokenizer.encode_raw_with_offsets(text)
    covered = 0
    for id, (start, end) in zip(ids, offsets, strict=True):
        assert tokenizer.token_bytes(id) in text[start:end].encode()
        assert start <= covered <= end, "no gap"
        covered = end
    assert covered == len(text)


@settings(deadline=None)
@given(text=any_text)
def test_text_arrives_in_whole_characters(text: str, tokenizer: Tokenizer) -> None:
    detokenizer, shown = IncrementalDetokenizer(tokenizer), ""
    for id in tokenizer.encode(text):
        piece = detokenizer.add(id)
        assert "\ufffd" not in piece or "\ufffd" in text
        shown += piece
        assert text.startswith(shown)
    assert detokenizer.finish() == ""
    assert shown == text


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_of_any_tokens_make_the_decoded_text(
    data: st.DataObject, tokenizer: Tokenizer
) -> None:
    """Also of tokens that never make a character: broken bytes become U+FFFD in both ways alike."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.add(id) for id in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_decoding_is_that_of_transformers(
    data: st.DataObject,
    skip: bool,
    tokenizer: Tokenizer,
    oracle: transformers.PreTrainedTokenizerBase,
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(
        ids, skip_special_tokens=skip
    )


def test_reasoning_tags_survive_decoding_and_specials_do_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_control("[gMASK]<sop><think>a</think><|user|><answer>b</answer>")
    assert tokenizer.decode(ids) == "<think>a</think><answer>b</answer>"
    assert tokenizer.token_bytes(ids[0]) == b""
    assert tokenizer.token_bytes(ids[2]) == b"<think>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


@pytest.mark.parametrize(
    "method", ["encode", "encode_control", "encode_raw", "encode_raw_with_offsets"]
)
@pytest.mark.parametrize("text", ["ab\ud800", "\udfff", "😀\ude00"])
def test_half_a_surrogate_pair_is_a_row_error(method: str, text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RowError, match=rf"character {len(text) - 1} is U\+D") as caught:
        getattr(tokenizer, method)(text)
    assert caught.value.code == "invalid_text"


def test_a_tokenizer_that_cuts_and_pads_is_not_let(tmp_path: Path) -> None:
    library = build_tokenizer()
    library.enable_truncation(3)
    library.enable_padding(length=20, pad_id=0)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(str(tmp_path))
    text = "The quick brown fox jumps over the lazy dog"
    wanted = build_tokenizer().encode(text).ids
    assert len(wanted) > 3
    assert (
        tokenizer.encode(text)
        == tokenizer.encode_control(text)
        == tokenizer.encode_raw(text)
        == wanted
    )


def test_added_tokens_that_swallow_blanks_are_split_as_the_library_does() -> None:
    library = build_tokenizer()
    library.add_tokens(
        [
            AddedToken("<pad>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=False),
            AddedToken("<|user|>s", normalized=False),
        ]
    )
    tokenizer = Tokenizer(library)
    for text in (
        "a  <pad>\n b",
        "word sword words word",
        "<|user|>s<|user|>",
        "(word) <pad>word",
        "",
    ):
        assert encode_pieces(tokenizer, text) == tokenizer.encode_control(text), text


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    library = build_tokenizer()
    library.add_tokens(
        [AddedToken("do not", normalized=False), AddedToken("答案", normalized=False)]
    )
    tokenizer = Tokenizer(library)
    ids = tokenizer.encode_control("We do not say 答案.")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(map(detokenizer.add, ids)) == tokenizer.decode(ids) == "We do not say 答案."


END, USER = "<|endoftext|>", "<|user|>"


@pytest.mark.parametrize(
    ("files", "eos", "pad"),
    [
        ({}, [], None),
        ({"tokenizer_config": {"eos_token": USER, "pad_token": END}}, [USER], END),
        ({"tokenizer_config": {"eos_token": {"content": END}}}, [END], None),
        (
            {"config": {"eos_token_id": [END, USER]}, "tokenizer_config": {"eos_token": END}},
            [END, USER],
            None,
        ),
        ({"config": {"text_config": {"eos_token_id": USER, "pad_token_id": END}}}, [USER], END),
        (
            {"config": {"eos_token_id": END}, "generation_config": {"eos_token_id": [USER, END]}},
            [USER, END],
            None,
        ),
        (
            {"generation_config": {"eos_token_id": USER}, "config": {"pad_token_id": END}},
            [USER],
            END,
        ),
        (
            {"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": USER}},
            [USER],
            None,
        ),
    ],
    ids=str,
)
def test_end_and_padding_come_from_the_first_file_that_names_them(
    files: dict[str, dict[str, object]], eos: list[str], pad: str | None, tmp_path: Path
) -> None:
    library = build_tokenizer()
    library.save(str(tmp_path / "tokenizer.json"))
    id_of = {token: library.token_to_id(token) for token in (END, USER)}
    for name, content in files.items():
        text = json.dumps(content)
        if name != "tokenizer_config":
            for token, id in id_of.items():
                text = text.replace(json.dumps(token), str(id))
        (tmp_path / f"{name}.json").write_text(text)
    tokenizer = Tokenizer.from_dir(str(tmp_path))
    assert tokenizer.eos_token_ids == tuple(id_of[token] for token in eos)
    assert tokenizer.pad_token_id == (None if pad is None else id_of[pad])


def test_vocab_size_counts_added_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.vocab_size == library.get_vocab_size(with_added_tokens=True)
    assert tokenizer.special_ids == {
        library.token_to_id(token) for token in SPECIAL_TOKENS + MEDIA_TOKENS
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file"),
        ({"tokenizer.json": "{"}, "does not describe a tokenizer"),
        ({"tokenizer.json": '{"model": {"type": "None"}}'}, "does not describe a tokenizer"),
        ({"tokenizer.json": None, "config.json": "[1]"}, "expected a JSON object"),
        ({"tokenizer.json": None, "generation_config.json": "{,"}, "cannot be read as JSON"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<eos>"}'},
            "no token of tokenizer.json",
        ),
    ],
    ids=str,
)
def test_a_broken_checkpoint_is_refused_with_the_file(
    files: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(build_tokenizer().to_str() if text is None else text)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.from_dir(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ConfigError, match="byte-level"):
        Tokenizer.from_dir(str(tmp_path))
