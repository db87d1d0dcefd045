"""BlockManager: which blocks of the KV cache are free, held or remembered for their contents.
Integers only, no torch.

A full block may be registered under (contents of the block before it, its own tokens). Contents are
numbered, and a number is never used twice, so that a lookup compares the tokens themselves and a
stale or colliding entry cannot be hit. Free blocks keep their contents until they are reused, least
recently freed first: those that nobody has found again before those that somebody has, so that a
stream of texts of their own leaves what is shared alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

ROOT = 0  # the contents number of the empty prefix


class BlockManager:
    """Owns block ids 0 .. num_blocks - 1, their reference counts and the prefix index.

    At most about `max_unproven` free blocks keep contents that nobody has found again: beyond that
    they are reused rather than memory that was never touched.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        max_unproven: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_evictions = 0  # remembered blocks whose contents were given up for new ones
        self._ref_counts = [0] * num_blocks
        self._max_unproven = num_blocks if max_unproven is None else max_unproven
        # Free blocks: without contents, with contents, with contents that were found again since
        # they were written.
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._unproven: OrderedDict[int, None] = OrderedDict()
        self._proven: OrderedDict[int, None] = OrderedDict()
        self._found: set[int] = set()  # blocks whose contents were found again, held or free
        # block id -> number of the contents it is registered for
        self._contents: dict[int, int] = {}
        self._index: dict[tuple[int, Hashable], int] = {}  # (contents before, tokens) -> block id
        self._keys: dict[int, tuple[int, Hashable]] = {}  # block id -> its key in the index
        self._next_contents = ROOT + 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, remembered ones included."""
        return len(self._blank) + len(self._unproven) + len(self._proven)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, tokens: Sequence[Hashable], limit: int) -> list[int]:
        """The longest chain of remembered blocks that starts `tokens`, up to `limit` tokens."""
        found: list[int] = []
        contents = ROOT
        for start in range(0, limit - self.block_size + 1, self.block_size):
            block_id = self._index.get((contents, tuple(tokens[start : start + self.block_size])))
            if block_id is None:
                break
            found.append(block_id)
            contents = self._contents[block_id]
        return found

    def num_unheld(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks holding them would take out of the free ones."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def hold(self, block_ids: Sequence[int]) -> None:
        """Takes one more reference to each block."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._pool(block_id)[block_id]
            if block_id in self._contents:
                self._found.add(block_id)
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, forgetting what they held; see `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        block_ids = [self._next_pool().popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._forget(block_id)
            self._ref_counts[block_id] = 1
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Gives back one reference to each, of the last first: a prefix lives longest."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._pool(block_id)[block_id] = None
                if block_id in self._blank:
                    self._blank.move_to_end(block_id, last=False)  # its memory is in use already

    def register(self, block_id: int, before: int, tokens: Sequence[Hashable]) -> int:
        """Remembers a held, full block by what comes `before` it and its tokens; returns its
        contents' number.

        When another block is remembered for the same, that one stays and its number is returned.
        """
        if not self.prefix_caching:
            return ROOT
        key = (before, tuple(tokens))
        known = self._index.get(key)
        if known is not None:
            return self._contents[known]
        self._index[key] = block_id
        self._keys[block_id] = key
        self._contents[block_id] = self._next_contents
        self._next_contents += 1
        return self._contents[block_id]

    def unregister(self, block_ids: Sequence[int]) -> None:
        """Forgets what held blocks were registered for and do not hold."""
        for block_id in block_ids:
            if block_id in self._contents:
                self._forget(block_id)
                self.num_evictions -= 1

    def contents(self, block_id: int) -> int:
        """The contents' number of a registered block."""
        return self._contents[block_id]

    def forget_all(self) -> None:
        """Forgets every remembered prefix; held blocks stay held."""
        for block_id in list(self._contents):
            self._forget(block_id)
        self._blank = OrderedDict.fromkeys([*self._unproven, *self._proven, *self._blank])
        self._unproven.clear()
        self._proven.clear()

    def _pool(self, block_id: int) -> OrderedDict[int, None]:
        """Where a block is, or goes, while it is free."""
        if block_id in self._found:
            return self._proven
        return self._unproven if block_id in self._contents else self._blank

    def _next_pool(self) -> OrderedDict[int, None]:
        """Where the next block to use comes from."""
        if len(self._unproven) > self._max_unproven:
            return self._unproven
        return self._blank or self._unproven or self._proven

    def _forget(self, block_id: int) -> None:
        self._found.discard(block_id)
        if self._contents.pop(block_id, None) is not None:
            del self._index[self._keys.pop(block_id)]
            self.num_evictions += 1

    def check(self) -> None:
        """Raises AssertionError when the books do not balance; for tests and for idle engines."""
        assert all(count >= 0 for count in self._ref_counts), "negative reference count"
        free = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        pools = [*self._blank, *self._unproven, *self._proven]
        assert free == set(pools), "a block is neither free nor held, or both"
        assert len(free) == len(pools), "a free block is in two pools"
        assert all(block_id in self._pool(block_id) for block_id in free), (
            "a free block is in the wrong pool"
        )
        assert self._found <= set(self._contents), "a block without contents was found again"
        assert set(self._contents) == set(self._keys), "a remembered block has no key"
        assert {key: block_id for block_id, key in self._keys.items()} == self._index, (
            "the index names a wrong block"
        )
        assert len(set(self._contents.values())) == len(self._contents), (
            "two blocks claim the same contents"
        )
