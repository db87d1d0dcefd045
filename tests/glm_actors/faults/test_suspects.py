"""The ledger finds exactly the rows that kill their process, in few deaths, whatever dies beside
them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from glm_batch.glm_actors.faults.suspects import Arrival, Guard, Ledger, Patience, Piece, _Turns
from glm_batch.models.errors import RowError


class Died(BaseException):
    """Stands for the end of a process."""


class LocalBook:
    """One worker's book in a ledger of this process."""

    def __init__(self, ledger: Ledger, name: str, *, is_restart: bool = False) -> None:
        self.ledger, self.name, self.is_restart = ledger, name, is_restart

    def arrive(self) -> Arrival:
        return self.ledger.arrive(self.name)

    def begin(self, unit: str, num_rows: int) -> list[Piece] | None:
        return self.ledger.begin(self.name, unit, num_rows)

    def enter(self, unit: str, start: int, stop: int) -> None:
        self.ledger.enter(self.name, unit, start, stop)

    def leave(self, unit: str, start: int, stop: int, *, wait: bool) -> None:
        self.ledger.leave(self.name, unit, start, stop)

    def finish(self, unit: str) -> None:
        self.ledger.finish(unit)

    def say(self, last_words: str) -> None:
        self.ledger.say(self.name, last_words)


PATIENCE = Patience(backoff_s=0.0)


def run_unit(
    ledger: Ledger, num_rows: int, kills: Callable[[int, int], bool]
) -> tuple[list[int | RowError], int]:
    """The answer of each row, and how many processes it has cost."""
    deaths = 0
    while True:
        guard = Guard(LocalBook(ledger, "w", is_restart=deaths > 0), "a worker")
        if guard.refusal:
            raise guard.refusal

        def work(start: int, stop: int) -> list[int]:
            if kills(start, stop):
                raise Died
            return list(range(start, stop))

        try:
            answers = guard.run("unit 0", num_rows, work)
        except Died:
            deaths += 1
            assert deaths < 500
            continue
        found: list[int | RowError] = []
        for answer in answers:
            assert answer.start == len(found)
            found += [answer.result] if isinstance(answer.result, RowError) else answer.result
        return found, deaths


@pytest.mark.parametrize("seed", range(20))
def test_the_culprits_are_found_and_nobody_else(seed: int) -> None:
    chance = random.Random(seed)
    num_rows = chance.choice([1, 2, 7, 33, 100, 1000, 2500])
    bad = set(chance.sample(range(num_rows), min(chance.randrange(3), num_rows // 2)))
    found, deaths = run_unit(
        Ledger(PATIENCE), num_rows, lambda start, stop: any(start <= row < stop for row in bad)
    )
    assert {row for row, answer in enumerate(found) if isinstance(answer, RowError)} == bad
    assert all(answer == row for row, answer in enumerate(found) if row not in bad)
    assert deaths <= 5 * len(bad)


@pytest.mark.parametrize("num_bad", [7, 12])
def test_many_culprits_in_one_unit_do_not_look_like_a_broken_worker(num_bad: int) -> None:
    """They did when the last that were left died one after the other."""
    found, deaths = run_unit(
        Ledger(PATIENCE), 32, lambda start, stop: any(start <= row < stop for row in range(num_bad))
    )
    assert [isinstance(answer, RowError) for answer in found] == [
        row < num_bad for row in range(32)
    ]
    assert deaths == 1 + 2 * num_bad


@pytest.mark.parametrize("seed", range(20))
def test_deaths_that_no_row_is_to_blame_for_cost_no_row(seed: int) -> None:
    """Five processes are killed at random; what survives is run to its end."""
    chance = random.Random(seed)
    left = 5

    def kills(start: int, stop: int) -> bool:
        nonlocal left
        killed = left > 0 and chance.random() < 0.3
        left -= killed
        return killed

    found, _ = run_unit(Ledger(PATIENCE), 500, kills)
    assert found == list(range(500))


def test_a_worker_that_always_dies_is_given_up_with_its_reason() -> None:
    ledger = Ledger(PATIENCE)
    deaths = 0

    def kills(start: int, stop: int) -> bool:
        nonlocal deaths
        deaths += 1
        ledger.say("w", "the device is lost")
        return True

    with pytest.raises(
        Exception, match=r"died 6 times in a row and finished nothing.*the device is lost"
    ):
        run_unit(ledger, 10_000, kills)
    assert deaths == PATIENCE.barren_deaths


def test_units_that_died_beside_a_culprit_are_run_alone_once() -> None:
    ledger = Ledger(PATIENCE)
    ledger.arrive("w")
    assert [ledger.begin("w", unit, 9) for unit in ("a", "b", "c")] == [None] * 3
    ledger.arrive("w", "Fatal Python error: Segmentation fault")
    assert ledger.begin("w", "d", 9) is None  # was not there
    ledger.leave("w", "d", 0, 9)
    for unit in ("a", "c"):
        assert ledger.begin("w", unit, 9) == [Piece(start=0, stop=9)]
        ledger.enter("w", unit, 0, 9)
        ledger.leave("w", unit, 0, 9)
        ledger.finish(unit)
        assert ledger.begin("w", unit, 9) is None  # forgotten
        ledger.leave("w", unit, 0, 9)
    ledger.enter("w", "b", 0, 9)
    ledger.arrive("w")
    pieces = ledger.begin("w", "b", 9)
    assert pieces is not None
    assert sorted((piece.start, piece.stop) for piece in pieces) == [
        (row, row + 1) for row in range(9)
    ]


def test_the_culprits_error_says_what_is_known() -> None:
    ledger = Ledger(PATIENCE)
    for _ in range(3):
        ledger.arrive("w", "Fatal Python error: Segmentation fault")
        ledger.begin("w", "a", 1)
        ledger.enter("w", "a", 0, 1)
    pieces = ledger.begin("w", "a", 1)
    assert pieces is not None
    assert pieces[0].error is not None
    assert pieces[0].error.code == "worker_died"
    assert "died 2 times" in pieces[0].error.message
    assert "Segmentation fault" in pieces[0].error.message


def test_workers_wait_longer_the_longer_nothing_works() -> None:
    ledger = Ledger(Patience(backoff_s=0.5, max_backoff_s=1.5, barren_deaths=7))
    assert [ledger.arrive("w").wait_s for _ in range(7)] == [0.0, 0.0, 0.5, 1.0, 1.5, 1.5, 1.5]
    assert ledger.arrive("w").refusal is not None
    ledger.leave("w", "a", 0, 1)
    assert ledger.arrive("w") == Arrival()


def test_a_suspect_runs_with_nothing_beside_it() -> None:
    turns = _Turns()
    running: list[str] = []
    seen: list[frozenset[str]] = []

    def run(name: str, *, alone: bool) -> None:
        for _ in range(30):
            with turns.alone() if alone else turns.beside_others():
                running.append(name)
                seen.append(frozenset(running))
                time.sleep(0.0005)
                running.remove(name)

    threads = [
        threading.Thread(target=run, args=(name,), kwargs={"alone": name in "xy"}, daemon=True)
        for name in "abcxy"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert {one for one in seen if one & {"x", "y"}} == {frozenset("x"), frozenset("y")}
    assert any(len(one) > 1 for one in seen)
