"""Affinity: units whose prompts begin alike go to a replica that has that beginning in its cache.

A unit leaves the least busy replica only for one that has at most AHEAD units more.
pipelines.graph.stages brings it into Ray Data.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

# in the metadata of a table's schema, which Ray's driver sees without the table
PREFIX_KEY = b"glm-batch.prefix"
SAMPLED_ROWS = 16
GRAIN = 64  # tokens
AHEAD = 2
MAX_KEYS = 10_000
Replica = TypeVar("Replica", bound=Hashable)


def with_prefix_key(table: pa.Table) -> pa.Table:
    """A table of requests, marked with a digest of the tokens with which all its prompts begin.

    Some rows evenly spread stand for all. Whole GRAINs count, so that a word which two questions on
    a document happen to share changes nothing; without one, nothing is marked.
    """
    prompts = table["input_ids"].combine_chunks()
    spread = (
        np.unique(np.linspace(0, len(prompts) - 1, SAMPLED_ROWS, dtype=np.int64))
        if len(prompts)
        else ()
    )
    sampled = [prompts[int(row)].values.to_numpy() for row in spread if prompts[int(row)].is_valid]
    shared = _shared(sampled)
    shared -= shared % GRAIN
    if not shared:
        return table
    digest = hashlib.blake2b(sampled[0][:shared].tobytes(), digest_size=16).digest()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), PREFIX_KEY: digest})


def prefix_key(schema: object) -> bytes | None:
    """What `with_prefix_key` has written, if it has."""
    metadata = schema.metadata if isinstance(schema, pa.Schema) else None
    return metadata.get(PREFIX_KEY) if metadata else None


class Affinity(Generic[Replica]):
    """Gives each beginning a home among the replicas; remembers the MAX_KEYS latest ones."""

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, Replica] = OrderedDict()
        self._hosted: Counter[Replica] = Counter()

    def choose(self, key: bytes, units: Mapping[Replica, int], most: int) -> Replica | None:
        """The replica for a unit, by how many units each has and may have; None: all are full."""
        least_busy = min(units, key=units.__getitem__, default=None)
        if least_busy is None or units[least_busy] >= most:
            return None
        home = self._homes.get(key)
        if home is None or home not in units:
            self._settle(key, least_busy)
        elif units[home] <= min(units[least_busy] + AHEAD, most - 1):
            self._homes.move_to_end(key)
            return home
        elif (
            self._hosted[least_busy] + 1 < self._hosted[home]
        ):  # else it is a guest there: its home has room again soon
            self._settle(key, least_busy)
        return least_busy

    def _settle(self, key: bytes, replica: Replica) -> None:
        self._leave(key)
        self._homes[key] = replica
        self._hosted[replica] += 1
        if len(self._homes) > MAX_KEYS:
            self._leave(next(iter(self._homes)))

    def _leave(self, key: bytes) -> None:
        home = self._homes.pop(key, None)
        if home is not None:
            self._hosted[home] -= 1


def _shared(prompts: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> int:
    """How many tokens all prompts begin with."""
    if not prompts:
        return 0
    shared = min(map(len, prompts))
    for prompt in prompts[1:]:
        differs = prompts[0][:shared] != prompt[:shared]
        if differs.any():
            shared = int(differs.argmax())
    return shared
