"""The block-table form of a step says of every query exactly which keys it sees, over the
scheduler's own batches.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import islice

import numpy as np
import pytest

from glm_batch.models.engine.cuda.batch_paged import PagedLayout, build_paged_step
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.works.readout import Readout
from tests.models.network.layers.test_attention import SEEDS, Step, steps, visible_slots

TILE_QUERIES = 4


def paged_batch(step: Step) -> Batch:
    return build_paged_step(
        step.chunks, block_size=step.block_size, tile_queries=TILE_QUERIES, num_ids=9
    ).batch


def seen_by_layout(layout: PagedLayout) -> list[list[int]]:
    """For each row the slots that its tile, its row_end and its tree bits let it see."""
    found: dict[int, list[int]] = {}
    for tiles, most in ((layout.single_tiles, 1), (layout.tiles, layout.tile_queries)):
        for sequence, first_row, count, tile_end in tiles.T.tolist():
            assert 1 <= count <= most
            for row in range(first_row, first_row + count):
                assert row not in found
                keys = [key for key in range(tile_end) if sees(layout, sequence, row, key)]
                table, size = layout.tables[layout.table_starts[sequence] :], layout.block_size
                found[row] = sorted(int(table[key // size]) * size + key % size for key in keys)
    return [found[row] for row in range(len(layout.row_ends))]


def sees(layout: PagedLayout, sequence: int, row: int, key: int) -> bool:
    if key < layout.row_ends[row]:
        return True
    if layout.tree_starts is None or layout.tree_rows is None or layout.tree_bits is None:
        return False
    node = key - layout.tree_starts[sequence]
    return bool(
        0 <= node < layout.tree_bits.shape[1] and layout.tree_bits[layout.tree_rows[row], node]
    )


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_layout_says_which_keys_each_query_sees(seed: int) -> None:
    for step in islice(steps(seed), 8):
        batch, expected = paged_batch(step), list(map(sorted, visible_slots(step)))
        assert seen_by_layout(batch.groups) == expected
        assert seen_by_layout(batch.out_groups) == [expected[row] for row in batch.out_rows]
        assert (batch.out_groups is batch.groups) == (len(batch.out_rows) == len(expected))


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_all_else_is_as_in_the_plain_batch(seed: int) -> None:
    for step in islice(steps(seed), 8):
        batch = paged_batch(step)
        for of, plain, names in (
            (batch, step.batch, ["input_ids", "positions", "slots", "out_rows", "media"]),
            (batch.readout, step.batch.readout, [field.name for field in fields(Readout)]),
        ):
            for name in names:
                np.testing.assert_array_equal(getattr(of, name), getattr(plain, name), err_msg=name)
