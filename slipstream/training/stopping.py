"""Ctrl-C and SIGTERM as a wish to stop at the next good place."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM is noted and a second one interrupts at once.

    Python hears signals in the main thread only; entered from another one, this never notes anything.
    """

    def __init__(self) -> None:
        self.is_requested = False
        """Whether somebody asked to stop."""
        self.is_insistent = False
        """Whether somebody asked again."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            self.is_insistent = True
            raise KeyboardInterrupt
        self.is_requested = True
