"""Requests and completions survive the way through Arrow."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glm_batch.glm_actors.units.batches import (
    request_table,
    to_completions,
    to_requests,
    with_completions,
)
from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Embed,
    Generate,
    Inspect,
    Output,
    PromptScores,
    Request,
    SamplingParams,
    Score,
    Tag,
    TopLogprob,
    Work,
)
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Media, MediaItem

WORKS: list[Work] = [
    Choose(choices=((1, 2), (3,)), count_end=True),
    Generate(
        sampling=SamplingParams(
            temperature=0.5, stop=("a", "b"), stop_token_ids=(1,), n=2, seed=2**62
        )
    ),
    Generate(constraint=Constraint(kind="regex", text="a+")),
    Classify(),
    Tag(),
    Embed(pooling="mean", normalize=True),
    Inspect(what="hidden_states"),
    Score(top=3),
]


def make_request(number: int, work: Work = Classify()) -> Request:  # noqa: B008  frozen
    return Request(id=f"k{number}", input_ids=list(range(number)), work=work)


def test_requests_of_every_kind_come_back_equal() -> None:
    requests = [make_request(number, work) for number, work in enumerate(WORKS * 2)]
    table = request_table([request.id for request in requests], requests)
    assert to_requests(table) == requests
    assert table["input_ids"].type == pa.list_(pa.int32())


def test_failed_rows_are_passed_over_and_keep_their_place() -> None:
    error = RowError("bad_json", "no")
    table = request_table(["a", "k1", "b", "k3"], [error, make_request(1), error, make_request(3)])
    assert [request.id for request in to_requests(table)] == ["k1", "k3"]
    answers = [Completion(id=f"k{n}", finish_reason="scored", prompt_tokens=n) for n in (1, 3)]
    found = to_completions(with_completions(table.append_column("#unit", [[0, 0, 0, 0]]), answers))
    assert [type(row) for row in found] == [RowError, Completion, RowError, Completion]
    assert [found[1], found[3]] == answers
    assert str(found[0]) == "[bad_json] no"


def test_an_error_may_quote_what_has_no_utf8() -> None:
    table = request_table(["a"], [RowError("bad_json", "at \ud800")])
    assert table["error_message"].to_pylist() == ["at \\ud800"]


def test_a_table_of_errors_alone_has_the_same_types() -> None:
    error = RowError("bad_json", "no")
    bad, good = request_table(["a"], [error]), request_table(["k1"], [make_request(1)])
    assert bad.schema == good.schema
    answered = with_completions(good, [Completion(id="k1", finish_reason="scored")])
    assert with_completions(bad, []).schema == answered.schema


@pytest.mark.parametrize(
    "fields",
    [
        {"choice_logprobs": (-0.5, -1.25)},
        {"array": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"array": np.arange(4, dtype=np.float32)},
        {"array": np.zeros((0, 3), np.float32)},
        {
            "outputs": (
                Output(
                    token_ids=(1, 2),
                    text="é\ufffd",
                    finish_reason="stop",
                    stop_reason=151336,
                    logprobs=(-0.1, -0.2),
                    top_logprobs=((TopLogprob(token_id=1, logprob=-0.1),), ()),
                ),
                Output(token_ids=(), text="", finish_reason="length", stop_reason="\n"),
            )
        },
    ],
)
def test_completions_come_back_equal(fields: dict[str, Any]) -> None:
    completion = Completion(
        id="k1", finish_reason="stop", prompt_tokens=1, cached_tokens=1, num_preemptions=2, **fields
    )
    table = with_completions(request_table(["k1"], [make_request(1)]), [completion])
    (found,) = to_completions(table)
    assert isinstance(found, Completion)
    for name in Completion.__dataclass_fields__:
        left, right = getattr(found, name), getattr(completion, name)
        if isinstance(right, np.ndarray):
            assert left.shape == right.shape
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


def test_an_error_of_the_engine_becomes_the_rows_error() -> None:
    failed = Completion(
        id="k1",
        finish_reason="error",
        prompt_tokens=9,
        error=RowError("prompt_too_long", "9 tokens"),
    )
    (found,) = to_completions(with_completions(request_table(["k1"], [make_request(1)]), [failed]))
    assert isinstance(found, Completion)
    assert (str(found.error), found.prompt_tokens) == ("[prompt_too_long] 9 tokens", 9)


# Media


def make_item(
    seed: int, grid: tuple[int, int, int] = (1, 4, 6), kind: MediaKind = "image"
) -> MediaItem:
    copies = 2 if kind == "video" else 1
    patches = np.random.default_rng(seed).integers(
        0, 256, (math.prod(grid), copies * 12), dtype=np.uint8
    )
    return MediaItem(
        kind=kind, patches=patches, grid_thw=grid, digest=hashlib.sha256(patches.tobytes()).digest()
    )


def with_media(number: int, *items: MediaItem) -> Request:
    positions = np.random.default_rng(number).integers(0, 99, (3, 5 + number))
    media = Media(items=items, positions=positions)
    return Request(id=f"k{number}", input_ids=[7] * (5 + number), work=Classify(), media=media)


CIRCLE, SQUARE, WIDE = make_item(1), make_item(2), make_item(3, (1, 2, 12))
CLIP = make_item(4, (3, 2, 4), "video")
SAME_BYTES = MediaItem(
    kind="image", patches=CIRCLE.patches, grid_thw=(1, 6, 4), digest=CIRCLE.digest
)
ROWS: list[Request | RowError] = [
    RowError("bad_image", "cut off"),
    with_media(1, CIRCLE, CLIP, CIRCLE),  # twice in one row
    make_request(2),
    RowError("null_media", "nothing"),
    with_media(4, SQUARE, CIRCLE, SAME_BYTES),  # and in a later one
    with_media(5, CLIP, WIDE),
]
KEYS = [f"k{number}" for number in range(len(ROWS))]


def assert_same_requests(found: list[Request], expected: list[Request]) -> None:
    assert [request.id for request in found] == [request.id for request in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.input_ids == theirs.input_ids
        assert (mine.media is None) == (theirs.media is None)
        if mine.media is None or theirs.media is None:
            continue
        np.testing.assert_array_equal(mine.media.positions, theirs.media.positions, strict=True)
        for item, wanted in zip(mine.media.items, theirs.media.items, strict=True):
            assert item.key == wanted.key
            np.testing.assert_array_equal(item.patches, wanted.patches, strict=True)


def over_ipc(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def behind(first: pa.Table, rest: pa.Table) -> pa.Table:
    return pa.concat_tables([first, rest]).combine_chunks().slice(first.num_rows)


def good(rows: list[Request | RowError]) -> list[Request]:
    return [row for row in rows if isinstance(row, Request)]


WAYS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "as it is": lambda table: table,
    "over IPC": over_ipc,
    "a slice of something longer": lambda table: (
        pa.concat_tables([table, table]).combine_chunks().slice(0, len(ROWS))
    ),
    "the rest of something longer": lambda table: behind(
        request_table(["k"], [with_media(9, make_item(9))]), table
    ),
    "several chunks": lambda table: pa.concat_tables(
        [table.slice(0, 2), table.slice(2, 3), table.slice(5)]
    ),
    "several chunks over IPC": lambda table: over_ipc(
        pa.concat_tables([table.slice(0, 2), table.slice(2)])
    ),
    "an empty chunk": lambda table: pa.concat_tables([table.slice(0, 0), table]),
}


@pytest.mark.parametrize("way", WAYS)
def test_media_come_back_equal_and_are_not_copied(way: str) -> None:
    table = WAYS[way](request_table(KEYS, ROWS))
    requests = to_requests(table)
    assert_same_requests(requests, good(ROWS))
    for request in requests:
        for item in request.media.items if request.media else ():
            assert lies_within(item.patches, table["media"]), "a view into the table"
            assert not item.patches.flags.writeable


def lies_within(array: np.ndarray[Any, Any], column: pa.ChunkedArray) -> bool:
    buffers = [chunk.values.field("patches").buffers()[2] for chunk in column.chunks]
    return any(
        b.address <= array.ctypes.data <= b.address + b.size - array.nbytes
        for b in buffers
        if b is not None
    )


def test_each_item_is_in_the_table_once() -> None:
    table = request_table(KEYS, ROWS)
    distinct = {
        item.key: item.patches.nbytes for row in good(ROWS) if row.media for item in row.media.items
    }
    patches = table["media"].chunk(0).values.field("patches")
    assert patches.null_count == 3
    assert patches.buffers()[2].size == sum(distinct.values())
    first, second = (
        request.media for request in to_requests(table)[:3] if request.media is not None
    )
    assert first.items[0] is first.items[2] is second.items[1]


def test_types_of_the_media_columns() -> None:
    schema = request_table(KEYS, ROWS).schema
    item = {
        "kind": pa.string(),
        "grid": pa.list_(pa.int32(), 3),
        "digest": pa.binary(),
        "patches": pa.large_binary(),
    }
    assert schema.field("media").type == pa.list_(pa.struct(item))
    assert schema.field("positions").type == pa.list_(pa.int32())
    assert schema == request_table(["k1"], [with_media(1, CLIP)]).schema
    text = request_table(["k1", "b"], [make_request(1), ROWS[0]])
    assert "media" not in text.column_names
    assert "positions" not in text.column_names
    table = request_table(KEYS, ROWS)
    assert table["media"].is_null().to_pylist() == [True, False, True, True, False, False]
    assert table["positions"].is_null().to_pylist() == [True, False, True, True, False, False]
    table.validate(full=True)


def test_a_row_whose_patches_were_cut_off_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"patches of a row's image of grid .* stood in an earlier row"
    ):
        to_requests(request_table(KEYS, ROWS).slice(2))


def test_patches_outlive_their_table() -> None:
    table = over_ipc(request_table(KEYS, ROWS))
    requests = to_requests(table)
    del table
    assert_same_requests(requests, good(ROWS))


def test_patches_that_are_not_contiguous_are_carried_too() -> None:
    turned = np.asfortranarray(CIRCLE.patches)
    item = MediaItem(kind="image", patches=turned, grid_thw=CIRCLE.grid_thw, digest=CIRCLE.digest)
    (found,) = to_requests(request_table(["k1"], [with_media(1, item)]))
    assert found.media is not None
    np.testing.assert_array_equal(found.media.items[0].patches, CIRCLE.patches)


def test_media_do_not_reach_the_completions() -> None:
    table = request_table(KEYS, ROWS)
    answers = [
        Completion(id=row.id, finish_reason="scored", media_tokens=6 * i)
        for i, row in enumerate(good(ROWS))
    ]
    answered = with_completions(table, answers)
    assert not {"media", "positions"} & set(answered.column_names)
    found = [row for row in to_completions(answered) if isinstance(row, Completion)]
    assert [row.media_tokens for row in found] == [0, 6, 12, 18]


@pytest.mark.parametrize(("tokens", "top"), [(4, 3), (4, 0), (1, 2)])
def test_scores_of_a_prompt_come_back_equal(tokens: int, top: int) -> None:
    """Also of a prompt of one token, which has none, and without alternatives."""
    ranks = np.arange((tokens - 1) * top).reshape(tokens - 1, top)
    scores = PromptScores(
        logprobs=-np.arange(tokens - 1, dtype=np.float32) / 3,
        top_ids=ranks.astype(np.int64),
        top_logprobs=-ranks.astype(np.float32) / 7,
    )
    table = request_table(["k1"], [make_request(1, Score(top=top))])
    done = Completion(id="k1", finish_reason="scored", prompt_tokens=tokens, scores=scores)
    (again,) = to_completions(with_completions(table, [done]))
    assert isinstance(again, Completion)
    assert again.scores is not None
    for name in ("logprobs", "top_ids", "top_logprobs"):
        before, after = getattr(scores, name), getattr(again.scores, name)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        np.testing.assert_array_equal(after, before)
