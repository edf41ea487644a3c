"""When requests go out, for all threads together, and that none does any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """What was under way has been given up."""


class Halt:
    """Ends pauses and calls in all threads at once."""

    def __init__(self) -> None:
        """Nothing is stopped yet."""
        self._stopped, self._lock = Event(), Lock()
        self._waiting: set[SimpleQueue[tuple[Any, BaseException | None]]] = set()

    @property
    def is_set(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End what is under way, from any thread; later calls end at once."""
        with self._lock:
            self._stopped.set()
            for answers in self._waiting:
                answers.put((None, StoppedError()))

    def pause(self, seconds: float) -> None:
        """Sleep, at most until we are stopped."""
        self._stopped.wait(max(0.0, seconds))

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, or its exception; StoppedError as soon as we are stopped.

        It runs in a thread of its own, which is left behind then: closing a socket does not wake the thread that reads
        from it, and its number may be given to another file meanwhile. Such a thread keeps no process from ending.
        """
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                answers.put((work(), None))
            except BaseException as error:  # raised again in the thread that waits
                answers.put((None, error))

        with self._lock:
            if self._stopped.is_set():
                raise StoppedError
            self._waiting.add(answers)
        try:
            Thread(target=run, daemon=True).start()
            result, error = answers.get()
        finally:
            with self._lock:
                self._waiting.discard(answers)
        if error is not None:
            raise error
        return result


class Pace:
    """When the next request may go out, for all threads together."""

    def __init__(
        self,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """No more than `per_minute` requests, evenly spread; None for no limit."""
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next, self._lock = 0.0, Lock()

    def wait(self) -> None:
        """Sleep until it is this request's turn."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._gap
        self._sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let nobody begin for a while: the server has asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
