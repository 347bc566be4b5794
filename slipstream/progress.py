"""How stages say how far they are, without knowing who listens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

_FARTHEST_APART = 1.4
"""How often the faster of two paces may go into the slower one; their geometric mean is then off by a fifth at most."""
_FEWEST_MARKS = 3
"""Results to wait for: of one or two nobody can tell how regular they are."""


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

    Two paces are known: that since the task was opened is too slow where it has to start up first, or where several
    workers begin together and all of their first results are still under way; that since the first result is too fast
    where workers deliver together. The true one is between, so nothing is said until the two are near each other, and
    then their geometric mean. A short task with a long start may end before.

    Args:
        total: Units in all, None where nobody knows.
        done: Units that an earlier run finished.
        clock: Seconds now.
    """

    def __init__(self, total: int | None, *, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._clock = total, done, clock
        self._opened = clock()
        self._first = self._last = _Mark(done, self._opened)
        self._num_marks = 0

    def advance(self, units: int) -> None:
        """Count units done."""
        if not units:
            return
        self._last = _Mark(self._last.done + units, self._clock())
        self._num_marks += 1
        if self._num_marks == 1:
            self._first = self._last

    @property
    def done(self) -> int:
        """Units done, those of an earlier run included."""
        return self._last.done

    @property
    def share(self) -> float | None:
        """Units done over all, None where that is unknown."""
        return min(self.done / self._total, 1.0) if self._total else None

    def seconds_left(self) -> float | None:
        """Seconds until the end, None while that cannot be told."""
        if not self._total or self._num_marks < _FEWEST_MARKS:
            return None
        last, now = self._last, self._clock()
        pace = self._pace(last)
        if pace is None:
            return None
        left = pace * (self._total - last.done) - (now - last.seconds)
        # a result that is late makes all slower: as if it had come just now, as large as those before
        usual = max(1, (last.done - self._before) // self._num_marks)
        if late := self._pace(_Mark(last.done + usual, now)):
            left = max(left, late * (self._total - last.done - usual))
        return max(left, 0.0)

    def _pace(self, mark: _Mark) -> float | None:
        """Seconds per unit up to a mark, None while nobody can tell."""
        since_opened = (mark.seconds - self._opened) / (mark.done - self._before)
        since_first = (mark.seconds - self._first.seconds) / (mark.done - self._first.done)
        slow, fast = max(since_opened, since_first), min(since_opened, since_first)
        return None if slow > _FARTHEST_APART * fast else math.sqrt(slow * fast)


class _Mark(NamedTuple):
    """A result of a task."""

    done: int
    """Units, those of an earlier run included."""
    seconds: float
    """When it came."""
