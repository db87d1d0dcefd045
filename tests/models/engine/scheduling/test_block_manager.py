"""The block manager's books under random use, and the prefix index against a plain dictionary of
texts.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glm_batch.models.engine.scheduling.block_manager import ROOT, BlockManager

SIZE = 2


def remember(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """Holds and registers all full blocks of a text, reusing what is known; returns the block
    table.
    """
    table = blocks.find_prefix(tokens, len(tokens))
    blocks.hold(table)
    before = blocks.contents(table[-1]) if table else ROOT
    for start in range(len(table) * SIZE, len(tokens) - SIZE + 1, SIZE):
        (block_id,) = blocks.allocate(1)
        before = blocks.register(block_id, before, tokens[start : start + SIZE])
        table.append(block_id)
    return table


class BlockManagerMachine(RuleBasedStateMachine):
    """Texts over two letters come and go; whatever the order, books balance and hits hold the
    asked-for text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, SIZE, max_unproven=4)
        self.tables: list[list[int]] = []
        self.text_of: dict[int, list[int]] = {}  # block id -> the whole text up to its end

    @rule(tokens=st.lists(st.integers(0, 1), max_size=10))
    def add(self, tokens: list[int]) -> None:
        hits = self.blocks.find_prefix(tokens, len(tokens))
        for i, block_id in enumerate(hits):
            assert self.text_of[block_id] == tokens[: (i + 1) * SIZE]
        missing = len(tokens) // SIZE - len(hits)
        if missing > self.blocks.num_free - self.blocks.num_unheld(hits):
            return
        table = remember(self.blocks, tokens)
        for i, block_id in enumerate(table):
            self.text_of[block_id] = tokens[: (i + 1) * SIZE]
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.blocks.release(self.tables.pop(index))

    @rule()
    def forget(self) -> None:
        self.blocks.forget_all()

    @invariant()
    def balanced(self) -> None:
        self.blocks.check()
        held = {block_id for table in self.tables for block_id in table}
        assert self.blocks.num_free == 12 - len(held)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 20))
def test_find_prefix_never_exceeds_the_limit(tokens: list[int], limit: int) -> None:
    blocks = BlockManager(16, SIZE)
    remember(blocks, tokens)
    found = blocks.find_prefix(tokens, limit)
    assert len(found) == min(limit, len(tokens)) // SIZE


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    blocks = BlockManager(8, SIZE)
    remember(blocks, [1, 1, 5, 5])
    assert blocks.find_prefix([2, 2, 5, 5], 4) == []


def test_a_reused_parent_takes_its_children_out_of_reach() -> None:
    """A block id that comes to hold another text must not make its old children look like that
    text's.
    """
    blocks = BlockManager(3, SIZE)
    table = remember(blocks, [1, 1, 2, 2])
    blocks.release(table)
    blocks.hold([table[1]])  # keep the child, lose the parent
    for tokens in ([7, 7], [8, 8]):
        blocks.release(remember(blocks, tokens))
    assert blocks.find_prefix([1, 1, 2, 2], 4) == []
    assert blocks.find_prefix([8, 8, 2, 2], 4) == blocks.find_prefix([8, 8], 2)
    blocks.check()


def test_tails_are_given_up_before_the_prefix_they_follow() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.release(remember(blocks, [1, 1, 2, 2, 3, 3]))
    blocks.allocate(2)  # one never used, one remembered
    assert len(blocks.find_prefix([1, 1, 2, 2, 3, 3], 6)) == 2
    assert blocks.num_evictions == 1


def test_asking_for_more_than_is_free_is_refused() -> None:
    blocks = BlockManager(2, SIZE)
    blocks.allocate(1)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 free"):
        blocks.allocate(2)


def test_texts_that_come_once_leave_what_was_found_again_and_memory_alone() -> None:
    blocks = BlockManager(64, SIZE, max_unproven=6)
    shared = [9, 9, 8, 8]
    for _ in range(2):
        blocks.release(remember(blocks, shared))
    used = set()
    for number in range(1000):
        table = remember(blocks, [*shared, number, number, number, number])
        used.update(table)
        blocks.release(table)
        blocks.check()
    assert len(blocks.find_prefix(shared, 4)) == 2
    # the shared ones, those kept in case they come again, those in use
    assert len(used) <= 2 + 6 + 2
    # the last ones are still there
    assert len(blocks.find_prefix([*shared, 999, 999, 999, 999], 8)) == 4


def test_what_was_found_again_is_given_up_last_but_given_up() -> None:
    blocks = BlockManager(3, SIZE)
    for _ in range(2):
        blocks.release(remember(blocks, [1, 1]))
    blocks.release(remember(blocks, [2, 2]))
    blocks.allocate(2)
    assert blocks.find_prefix([1, 1], 2)
    assert not blocks.find_prefix([2, 2], 2)
    blocks.allocate(1)
    assert not blocks.find_prefix([1, 1], 2)
    blocks.check()
