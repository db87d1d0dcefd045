"""EngineLoop: one thread that steps one Engine, so that many callers can wait for their own
requests.

Owns the hand-over of requests and completions between threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from glm_batch.glm_actors.faults.watchdog import Watchdog
from glm_batch.models.engine.api.interface import Engine
from glm_batch.models.engine.api.request import Completion, Delta, Request
from glm_batch.models.errors import EngineError

OnDeltas = Callable[[list[Delta]], None]


class Submission(Future[list[Completion]]):
    """Requests that were submitted together: a future of one completion for each of them, in their
    order.

    It cannot be cancelled: EngineLoop.abort ends its requests, which still complete. `on_deltas`
    gets what streaming requests among them write; it is called on the loop's thread, must return at
    once and never raises. Submissions with the same one (by ==) share a call for each step of the
    engine.
    """

    def __init__(self, requests: Sequence[Request], on_deltas: OnDeltas | None = None) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.requests = requests
        self.on_deltas = on_deltas
        self._completions: dict[str, Completion] = {}

    def finished(self) -> list[Completion]:
        """The completions there are by now, in the order in which they came."""
        return list(self._completions.values())

    def add(self, completion: Completion) -> None:
        """For the loop: takes one more of them; the last one resolves the future."""
        self._completions[completion.id] = completion
        if len(self._completions) == len(self.requests):
            self.set_result([self._completions[request.id] for request in self.requests])


class _Look:
    """A question to the engine, and the future of its answer."""

    def __init__(self, at: Callable[[Engine], Any]) -> None:
        self._at = at
        self.seen: Future[Any] = Future()
        self.seen.set_running_or_notify_cancel()

    def take(self, engine: Engine) -> None:
        try:
            self.seen.set_result(self._at(engine))
        except Exception as error:  # a thread's border: it belongs to whoever asked
            self.seen.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Seconds in which the engine worked, and in which it had nothing to do."""

    busy_s: float = 0.0
    idle_s: float = 0.0


class EngineLoop:
    """Builds an engine in a thread of its own and steps it there while it has work.

    One thread does both because an OpenMP library keeps a team of workers for each thread that
    computes: with a second team about, there are more of them than cores, and all go to sleep
    between two operators instead of spinning. The constructor returns once the engine is built, and
    raises what building it raised. The first exception out of the engine ends the loop: every
    waiting future fails with EngineError, and so does every later `submit`. A watchdog is told what
    the thread is at.
    """

    def __init__(self, build: Callable[[], Engine], watchdog: Watchdog | None = None) -> None:
        self._watchdog = watchdog
        built: Future[Engine] = Future()
        self._condition = threading.Condition()
        self._arrived: list[Submission] = []
        self._unwanted: list[str] = []
        self._looks: list[_Look] = []
        self._waiting: dict[str, Submission] = {}
        self._streams = False  # an engine is asked for deltas once anybody wants some
        self._failure: EngineError | None = None
        self._closing = False
        self._usage = Usage()
        # until when time is accounted for, from the first requests on
        self._marked: float | None = None
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="engine-loop", daemon=True
        )
        self._thread.start()
        self._engine = built.result()

    @property
    def failure(self) -> EngineError | None:
        """Why the loop is dead; None while it lives."""
        return self._failure

    def submit(self, requests: Sequence[Request], on_deltas: OnDeltas | None = None) -> Submission:
        """`on_deltas`: see Submission; it gets all of a request's deltas before its completion
        counts.

        Raises EngineError when the loop is dead, and ValueError for an id that is in flight
        already.
        """
        submission = Submission(requests, on_deltas)
        with self._condition:
            if self._failure is not None:
                raise self._failure
            self._refuse_known_ids(requests)
            if not requests:
                submission.set_result([])
                return submission
            self._waiting |= {request.id: submission for request in requests}
            self._arrived.append(submission)
            self._condition.notify()
        return submission

    def abort(self, ids: Sequence[str]) -> None:
        """Ends requests early, after the present step at the latest; unknown ids are ignored."""
        with self._condition:
            self._unwanted += ids
            self._condition.notify()

    def look(self, at: Callable[[Engine], Any]) -> Future[Any]:
        """What `at` finds in the engine between two steps, or what it raises, or EngineError."""
        look = _Look(at)
        with self._condition:
            if self._failure is not None:
                look.seen.set_exception(self._failure)
            else:
                self._looks.append(look)
                self._condition.notify()
        return look.seen

    def take_usage(self) -> Usage:
        """Of the time since the last call; what was before the first requests is nobody's."""
        with self._condition:
            usage, self._usage = self._usage, Usage()
        return usage

    def close(self) -> None:
        """Ends the thread after its present step, and the engine; requests in flight fail."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def _refuse_known_ids(self, requests: Sequence[Request]) -> None:
        ids = {request.id for request in requests}
        if len(ids) < len(requests) or not ids.isdisjoint(self._waiting):
            known = sorted(ids & self._waiting.keys()) or [request.id for request in requests]
            raise ValueError(f"request ids must be unique among those in flight: {known[:5]}")

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            with self._watch("loading"):
                self._engine = build()
            built.set_result(self._engine)
        except Exception as error:  # a thread's border: the constructor waits for it
            built.set_exception(error)
            return
        try:
            while self._take_arrivals():
                with self._watch("step"):
                    completions = self._engine.step()
                if self._streams:
                    self._hand_out(self._engine.deltas())
                self._deliver(completions)
            self._fail(EngineError("the engine was closed"))
            self._engine.close()
        except (
            Exception
        ) as error:  # a thread's border: whatever it was, those who wait must hear of it
            failure = (
                error
                if isinstance(error, EngineError)
                else EngineError(f"{type(error).__name__}: {error}")
            )
            if failure is not error:
                failure.__cause__ = error
            self._fail(failure)

    def _watch(self, what: Literal["loading", "step"]) -> AbstractContextManager[None]:
        return self._watchdog.watch(what) if self._watchdog else nullcontext()

    def _take_arrivals(self) -> bool:
        """Hands new requests to the engine, or sleeps. False when the loop should end."""
        with self._condition:
            self._account(busy=True)
            self._condition.wait_for(
                lambda: (
                    self._closing
                    or self._arrived
                    or self._unwanted
                    or self._looks
                    or self._engine.has_work()
                )
            )
            arrived, self._arrived = self._arrived, []
            unwanted, self._unwanted = self._unwanted, []
            looks, self._looks = self._looks, []
            closing = self._closing
            if arrived and self._marked is None:
                self._marked = time.monotonic()
            self._account(busy=False)
        if arrived and not closing:
            requests = [request for submission in arrived for request in submission.requests]
            self._streams = self._streams or any(request.stream for request in requests)
            self._engine.submit(requests)
        if unwanted and not closing:
            self._engine.abort(unwanted)
        for look in looks:
            look.take(self._engine)
        return not closing

    def _account(self, *, busy: bool) -> None:
        """Counts the time since the last call as busy, or as idle."""
        if self._marked is None:
            return
        now = time.monotonic()
        took, self._marked = now - self._marked, now
        usage = self._usage
        self._usage = (
            replace(usage, busy_s=usage.busy_s + took)
            if busy
            else replace(usage, idle_s=usage.idle_s + took)
        )

    def _hand_out(self, deltas: list[Delta]) -> None:
        gained: dict[OnDeltas, list[Delta]] = {}
        for delta in deltas:
            on_deltas = self._waiting[delta.id].on_deltas
            if on_deltas is not None:
                gained.setdefault(on_deltas, []).append(delta)
        for on_deltas, own in gained.items():
            on_deltas(own)

    def _deliver(self, completions: list[Completion]) -> None:
        with self._condition:
            for completion in completions:
                submission = self._waiting.pop(completion.id, None)
                if submission is None:
                    raise EngineError(
                        f"the engine completed {completion.id!r}, which is not in flight"
                    )
                submission.add(completion)
            if self._waiting and not self._arrived and not self._engine.has_work():
                raise EngineError(
                    f"the engine lost {len(self._waiting)} requests, "
                    f"{next(iter(self._waiting))!r} first"
                )

    def _fail(self, failure: EngineError) -> None:
        with self._condition:
            self._failure = failure
            unanswered = set(self._waiting.values())
            self._waiting.clear()
            self._arrived.clear()
            looks, self._looks = self._looks, []
            for submission in unanswered:
                submission.set_exception(failure)
            for look in looks:
                look.seen.set_exception(failure)
