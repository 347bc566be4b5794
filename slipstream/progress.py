"""How stages say how far they are, without knowing who listens."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Something that can show a task advancing."""

    def task(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a task; the yielded function takes (units done since the last call, note)."""
        ...


class Silent:
    """Shows nothing; what stages use when nobody watches."""

    def task(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a task that nobody sees."""
        return nullcontext(lambda done, note: None)
