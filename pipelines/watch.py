"""Waits for what a job gives while it looks around for reasons to stop. Knows nothing of either."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

LOOK_S = 0.25

T = TypeVar("T")


def watched(items: Iterable[T], is_over: Callable[[], bool]) -> Iterator[T]:
    """Gives the items as they come, from a thread of their own; ends when they do, or as soon as `is_over` says so.

    `is_over` is asked at least every LOOK_S seconds and after every item. What it raises, and what the items raise,
    comes out here.
    """
    results: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def work() -> None:
        try:
            for item in items:
                results.put(("item", item))
                if abandoned.is_set():
                    return
            results.put(("end", None))
        except BaseException as error:  # of another thread: raised again where it is waited for
            results.put(("error", error))

    threading.Thread(target=work, name="records", daemon=True).start()
    try:
        while not is_over():
            try:
                kind, value = results.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if kind == "end":
                return
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]  # an item, by its kind
    finally:
        abandoned.set()
