"""The support-desk world and the shipped shards keep what the README and the job files promise."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import make_shards
import pyarrow.parquet as pq
import pytest
import yaml
from sentences import EVAL, TRAIN, Split
from world import CONTROL_STRINGS, LABELS, Ticket, tickets, with_control_strings

ORDER_ID = re.compile(r"[A-Z]\d\d-\d{4}")
SPLITS = pytest.mark.parametrize("split", [TRAIN, EVAL], ids=["train", "eval"])


def take(split: Split, number: int, seed: int = 0) -> list[Ticket]:
    return list(itertools.islice(tickets(split, seed), number))


@pytest.fixture(scope="module")
def shards() -> dict[Path, list[dict[str, str | None]]]:
    return {path: read_rows(path) for path in sorted(make_shards.FOLDER.iterdir())}


@pytest.fixture(scope="module")
def rows(shards: dict[Path, list[dict[str, str | None]]]) -> list[dict[str, str | None]]:
    return [row for part in shards.values() for row in part]


def read_rows(path: Path) -> list[dict[str, str | None]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_gives_the_same_tickets() -> None:
    assert take(TRAIN, 200, seed=3) == take(TRAIN, 200, seed=3)
    assert take(TRAIN, 200, seed=3) != take(TRAIN, 200, seed=4)


def test_train_and_eval_share_no_sentence() -> None:
    def normal(split: Split) -> set[str]:
        return {re.sub(r"\W+", " ", sentence).strip().lower() for sentence in split.sentences()}

    assert not normal(TRAIN) & normal(EVAL)


@SPLITS
def test_each_label_has_its_own_sentences(split: Split) -> None:
    assert tuple(split.problems) == LABELS
    counts = Counter(sentence for sentences in split.problems.values() for sentence in sentences)
    assert max(counts.values()) == 1
    assert min(len(sentences) for sentences in split.problems.values()) >= (
        30 if split is TRAIN else 12
    )


@SPLITS
def test_a_ticket_is_filled_and_names_exactly_its_order(split: Split) -> None:
    for ticket in take(split, 2000):
        assert not re.search(r"[{}|()]", ticket.text), ticket.text
        assert ORDER_ID.findall(ticket.text) == ([ticket.order_id] if ticket.order_id else []), (
            ticket.text
        )


def test_labels_and_orders_come_in_fair_shares() -> None:
    sample = take(TRAIN, 5000)
    labels = Counter(ticket.label for ticket in sample)
    assert all(0.17 < labels[label] / len(sample) < 0.23 for label in LABELS)
    assert 0.55 < sum(ticket.order_id is not None for ticket in sample) / len(sample) < 0.65


def test_gold_answers_follow_from_label_and_order() -> None:
    ticket = Ticket(text="", label="billing", order_id="A12-3456")
    assert ticket.reply == "Thanks, our billing team will look into order A12-3456."
    assert ticket.order_json == '{"order_id": "A12-3456"}'
    ticket = Ticket(text="", label="other", order_id=None)
    assert ticket.reply == "Thanks, our support team will get back to you."
    assert ticket.order_json == '{"order_id": null}'


def test_control_strings_are_inserted_and_nothing_else_changes() -> None:
    rng = random.Random(0)
    for ticket in take(EVAL, 100):
        typed = with_control_strings(ticket, rng)
        assert any(control in typed.text for control in CONTROL_STRINGS)
        assert [
            word for word in typed.text.split(" ") if word not in CONTROL_STRINGS
        ] == ticket.text.split(" ")
        assert (typed.label, typed.order_id) == (ticket.label, ticket.order_id)


def test_the_generator_writes_the_shipped_shards(
    tmp_path: Path, shards: dict[Path, list[dict[str, str | None]]]
) -> None:
    written = make_shards.write_shards(tmp_path)
    assert {path.name: read_rows(path) for path in written} == {
        path.name: part for path, part in shards.items()
    }


def test_shards_hold_the_promised_files_columns_and_rows(
    shards: dict[Path, list[dict[str, str | None]]], rows: list[dict[str, str | None]]
) -> None:
    assert Counter(path.suffix for path in shards) == {".parquet": 3, ".jsonl": 2}
    assert all(
        pq.read_schema(path).equals(make_shards.SCHEMA)
        for path in shards
        if path.suffix == ".parquet"
    )
    assert all(list(row) == make_shards.SCHEMA.names for row in rows)
    assert len(rows) == len({row["id"] for row in rows}) == 2400
    assert sum(path.stat().st_size for path in shards) < 1_500_000


def test_every_file_holds_bad_rows_and_only_those_lack_gold(
    shards: dict[Path, list[dict[str, str | None]]],
) -> None:
    kinds: Counter[str] = Counter()
    for part in shards.values():
        for row in part:
            text, gold = row["text"], [row["gold_label"], row["gold_order"], row["gold_reply"]]
            overlong, empty = (
                len(text or "") > make_shards.OVERLONG_CHARS,
                text is not None and not text.strip(),
            )
            must_fail = text is None or overlong or empty
            assert gold == [None] * 3 if must_fail else None not in gold, row["id"]
            kinds["null"] += text is None
            kinds["overlong"] += overlong
            kinds["empty"] += empty
            kinds["control"] += text is not None and any(
                control in text for control in CONTROL_STRINGS
            )
        assert any(row["gold_label"] is None for row in part)
    assert kinds == {
        "null": make_shards.NUM_NULL,
        "overlong": make_shards.NUM_OVERLONG,
        "empty": make_shards.NUM_EMPTY,
        "control": make_shards.NUM_CONTROL,
    }


@pytest.mark.parametrize("name", ["route", "extract", "reply"])
def test_job_files_point_at_what_is_shipped(name: str, rows: list[dict[str, str | None]]) -> None:
    root = Path(__file__).parents[2]
    job = yaml.safe_load((root / "examples" / f"{name}.yaml").read_text())
    assert (root / job["model"] / "config.json").is_file()
    assert sorted(path for pattern in job["input"] for path in root.glob(pattern)) == sorted(
        make_shards.FOLDER.iterdir()
    )
    assert {job["key"], job["task"]["gold"], *job["carry"]} <= set(rows[0])
    assert job["task"]["prompt"].endswith("{text}")
    share_of_bad_rows = sum(row["gold_label"] is None for row in rows) / len(rows)
    assert share_of_bad_rows < job["max_error_rate"] < 2.5 * share_of_bad_rows
