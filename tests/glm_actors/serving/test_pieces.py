"""The way of pieces from replicas to the HTTP process: in order, to whom they belong, and what
becomes of a break.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from glm_batch.glm_actors.serving.http import pieces
from glm_batch.glm_actors.serving.http.pieces import Address, Mailbox, Outlets, Piece


@contextlib.contextmanager
def counted_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pieces each message had."""
    sizes: list[int] = []
    loads = pieces.json.loads

    def count(message: bytes) -> list[object]:
        found: list[object] = loads(message)
        sizes.append(len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pieces.json, "loads", count)
        yield sizes


def test_pieces_of_one_turn_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> tuple[list[Piece], list[Piece]]:
        mailbox, outlets = Mailbox("127.0.0.1"), Outlets()
        address = await mailbox.address()
        assert address == await mailbox.address()
        outlet = await outlets.to(address)
        assert outlet is await outlets.to(address)
        first: asyncio.Queue[Piece] = asyncio.Queue()
        second: asyncio.Queue[Piece] = asyncio.Queue()
        with mailbox.box(first.put_nowait) as one, mailbox.box(second.put_nowait) as two:
            with (
                outlet.stream(one) as give,
                outlet.stream(two) as give_two,
                outlet.stream(999) as give_nobody,
            ):
                for number in range(3):
                    give(Piece(chunks=[{"n": number}], num_tokens=number))
                    give_two(Piece(num_tokens=10 + number))
                    give_nobody(Piece())
                    await asyncio.sleep(0.01)
                give(Piece(usage={"total_tokens": 3}))
            found = [await first.get() for _ in range(4)], [await second.get() for _ in range(3)]
        await mailbox.close()
        return found

    with counted_messages(monkeypatch) as sizes:
        one, two = asyncio.run(talk())
    assert [piece.chunks for piece in one] == [[{"n": 0}], [{"n": 1}], [{"n": 2}], []]
    assert [piece.usage for piece in one] == [None, None, None, {"total_tokens": 3}]
    assert [piece.num_tokens for piece in two] == [10, 11, 12]
    assert sizes == [3, 3, 3, 1]


def test_a_wrong_secret_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> int:
        mailbox, outlets = Mailbox("127.0.0.1"), Outlets()
        address = await mailbox.address()
        heard: list[Piece] = []
        with mailbox.box(heard.append) as number:
            outlet = await outlets.to(Address(address.host, address.port, bytes(32)))
            with outlet.stream(number) as give:
                give(Piece())
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.sleep(10)
        await mailbox.close()
        return len(heard)

    with counted_messages(monkeypatch) as sizes:
        assert asyncio.run(talk()) == 0
    assert not sizes  # nothing of it was as much as read


def test_a_broken_connection_ends_its_streams_and_the_next_one_is_new() -> None:
    async def talk() -> None:
        mailbox, outlets = Mailbox("127.0.0.1"), Outlets()
        address = await mailbox.address()
        outlet = await outlets.to(address)

        async def stream() -> None:
            with outlet.stream(0):
                await asyncio.sleep(60)

        streaming = asyncio.ensure_future(stream())
        await asyncio.sleep(0.01)
        outlet._transport.abort()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(streaming), 10)
        assert await outlets.to(address) is not outlet
        await mailbox.close()

    asyncio.run(talk())


def test_nobody_at_the_address_is_an_error() -> None:
    async def talk() -> None:
        await Outlets().to(Address("127.0.0.1", 1, bytes(32)))

    with pytest.raises(OSError, match="Connect call failed"):
        asyncio.run(talk())
