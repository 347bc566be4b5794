"""How stages say how far they are, without knowing who listens."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Something that can show a task advancing."""

    def task(
        self, label: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a task; the yielded function takes (units done since the last call, note).

        Args:
            label: What is done.
            total: Units in all.
            unit: What is counted.
            done: Units that an earlier run finished; they say nothing about how fast this one is.
        """
        ...

    def measured(self, step: int, logloss: float) -> None:
        """Hear of a measurement on validation data while training goes on; what it raises ends the training.

        Args:
            step: Steps done.
            logloss: Of the model as it would be served.
        """
        ...


class Silent:
    """Shows nothing; what stages use when nobody watches."""

    def task(
        self, label: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a task that nobody sees."""
        return nullcontext(lambda done, note: None)

    def measured(self, step: int, logloss: float) -> None:
        """Hear of a measurement that nobody looks at."""


class Pace:
    """How far a task is, and how long it will take.

    Args:
        total: Units in all, None where nobody knows.
        done: Units that an earlier run finished.
        clock: Seconds now.
    """

    def __init__(self, total: int | None, *, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._clock = total, done, clock
        self._done, self._started = done, clock()
        self._first: tuple[int, float] | None = None
        """What was done after the first advance, and when that was."""

    def advance(self, units: int) -> None:
        """Count units done."""
        self._done += units
        if units and self._first is None:
            self._first = self._done, self._clock()

    @property
    def done(self) -> int:
        """Units done, those of an earlier run included."""
        return self._done

    @property
    def share(self) -> float | None:
        """Units done over all, None where that is unknown."""
        return min(self._done / self._total, 1.0) if self._total else None

    def seconds_left(self) -> float | None:
        """Seconds until the end, None before anything is done.

        The pace since the task was opened is too slow: several workers begin together, and the first result takes as
        long as their next ones. The pace since that result is too fast by as much. Their mean is taken.
        """
        here = self._done - self._before
        if not self._total or here <= 0 or self._first is None:
            return None
        now, (first_done, first_time) = self._clock(), self._first
        seconds_per_unit = (now - self._started) / here
        if self._done > first_done:
            seconds_per_unit = (seconds_per_unit + (now - first_time) / (self._done - first_done)) / 2
        return seconds_per_unit * max(self._total - self._done, 0)
