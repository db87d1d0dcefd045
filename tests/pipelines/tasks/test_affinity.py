"""Units that begin alike meet the replica that knows their beginning, and no replica is left idle
for it.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.pipelines.tasks.affinity import (
    AHEAD,
    GRAIN,
    MAX_KEYS,
    Affinity,
    prefix_key,
    with_prefix_key,
)

DOCUMENTS = [[document] * GRAIN for document in range(4)]


def unit(prompts: list[list[int] | None]) -> pa.Table:
    return pa.table({"input_ids": pa.array(prompts, pa.list_(pa.int32()))})


def key_of(prompts: list[list[int] | None]) -> bytes | None:
    return prefix_key(with_prefix_key(unit(prompts)).schema)


def test_units_about_one_document_have_one_key():
    keys = [key_of([[*document, 7, question] for question in range(5)]) for document in DOCUMENTS]
    assert None not in keys
    assert len(set(keys)) == len(DOCUMENTS)
    # a bad row changes nothing
    assert keys[0] == key_of([[*DOCUMENTS[0], 7, 90], None, [*DOCUMENTS[0], 7, 91, 92]])
    # nor do questions that begin alike
    assert keys[0] == key_of([[*DOCUMENTS[0], 7, 8, 1], [*DOCUMENTS[0], 7, 8, 2]])


@pytest.mark.parametrize(
    "prompts", [[], [None, None], [[1, 2, 3]], [[1, *DOCUMENTS[0]], [2, *DOCUMENTS[0]]]]
)
def test_where_little_is_shared_there_is_no_key(prompts: list[list[int] | None]):
    assert key_of(prompts) is None


def test_a_table_keeps_its_rows_and_its_other_metadata():
    table = unit([DOCUMENTS[0]]).replace_schema_metadata({"mine": "kept"})
    marked = with_prefix_key(table)
    assert marked.equals(table)
    assert marked.schema.metadata[b"mine"] == b"kept"


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 8), st.integers(1, 6))
def test_no_replica_is_far_ahead_of_the_least_busy_one(
    seed: int, replicas: int, keys: int, most: int
):
    dice, affinity = random.Random(seed), Affinity[int]()
    units = dict.fromkeys(range(replicas), 0)
    for _ in range(100):
        chosen = affinity.choose(bytes([dice.randrange(keys)]), units, most)
        if chosen is None:
            assert min(units.values()) == most
        else:
            assert units[chosen] < most
            assert units[chosen] <= min(units.values()) + AHEAD
            units[chosen] += 1
        finished = dice.choice(list(units))
        units[finished] = max(0, units[finished] - dice.randrange(3))


def test_a_document_stays_where_it_is():
    affinity = Affinity[str]()
    even = {"a": 1, "b": 1}
    homes = {key: affinity.choose(key, {"a": 1, "b": 2}, 6) for key in (b"x", b"y", b"z")}
    assert set(homes.values()) == {"a"}  # the only one that is free
    assert affinity.choose(b"x", {"a": 1 + AHEAD, "b": 1}, 6) == "a"
    assert affinity.choose(b"x", {"a": 2 + AHEAD, "b": 1}, 6) == "b"
    assert affinity.choose(b"x", even, 6) == "b"  # it has moved: "a" was home to all three
    assert affinity.choose(b"y", {"a": 2 + AHEAD, "b": 1}, 6) == "b"
    assert affinity.choose(b"y", even, 6) == "a"  # it was a guest
    assert affinity.choose(b"y", {"b": 1}, 6) == "b"  # its replica is gone
    assert affinity.choose(b"y", {}, 6) is None


def test_old_documents_are_forgotten():
    affinity = Affinity[str]()
    assert affinity.choose(b"first", {"a": 0}, 6) == "a"
    for number in range(MAX_KEYS):
        affinity.choose(number.to_bytes(4), {"b": 0}, 6)
    assert affinity.choose(b"first", {"a": 1, "b": 0}, 6) == "b"


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_gives_each_unit_to_the_replica_that_was_chosen(monkeypatch: pytest.MonkeyPatch):
    """What reaches into Ray Data finds what it looks for in the version that is installed here."""
    from glm_batch.pipelines.graph import stages

    asked: list[tuple[bytes, Any]] = []

    class Stubborn(Affinity[Any]):
        """Chooses what Ray Data would not: a replica that has something to do already."""

        def choose(self, key: bytes, units: Mapping[Any, int], most: int) -> Any:
            replica = max((one for one in units if units[one] < most), key=str, default=None)
            if replica is not None:
                asked.append((key, replica))
            return replica

    class ModelActor:  # the name is what counts
        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.05)
            return pa.table({"replica": [os.getpid()]})

    monkeypatch.setattr(stages, "Affinity", Stubborn)
    units = [with_prefix_key(unit([document])) for document in DOCUMENTS * 8]
    dataset = ray.data.from_arrow(units)
    dataset.context.custom_execution_callback_classes = [stages.ByAffinity]
    pool = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=6)
    done = dataset.map_batches(
        ModelActor, batch_size=None, batch_format="pyarrow", compute=pool, num_cpus=0.1
    ).take_all()
    assert Counter(key for key, _ in asked) == Counter(prefix_key(each.schema) for each in units)
    ran = Counter(row["replica"] for row in done)
    assert sorted(ran.values()) == sorted(Counter(replica for _, replica in asked).values())
