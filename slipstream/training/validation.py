"""Measurements on validation data while training goes on: the best model so far, and when to stop.

What is measured is what would be served: the mean of the weights, where there is one by then. The best model is kept on
disk, so that it costs no memory; a checkpoint says which one it is, and a run that is resumed measures again what came
after its checkpoint, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from slipstream.io.figures import ValidationFigures
from slipstream.ops.metrics import Quality


class Validation:
    """Keeps the books of measurements; better is what has the lower logloss.

    Args:
        every_steps: Steps between measurements, beside those at the end of every epoch; 0 has those alone.
        patience: Measurements in a row without a better one after which training stops; 0 never stops it.
        measure: Measures validation data with what is served.
        keep: Writes what is served in place of the best so far; returns its hash.
        on_measured: Told the step and the logloss of each measurement; what it raises ends the training.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        patience: int,
        measure: Callable[[], Quality],
        keep: Callable[[], str],
        on_measured: Callable[[int, float], None] = lambda step, logloss: None,
    ) -> None:
        self._every_steps, self._patience = every_steps, patience
        self._measure, self._keep, self._on_measured = measure, keep, on_measured
        self.checks: list[ValidationFigures] = []
        self.best: ValidationFigures | None = None
        """The best measurement; None before the first."""
        self.best_hash: str | None = None
        """What `keep` said of its model."""

    def __call__(self, *, step: int, epoch: int) -> None:
        """Measure what is served after a step, unless that was done, and keep it where nothing before was better."""
        if self.checks and self.checks[-1].step == step:
            return
        found = ValidationFigures(step=step, epoch=epoch, quality=self._measure())
        self.checks.append(found)
        if self.best is None or found.quality.logloss < self.best.quality.logloss:
            self.best, self.best_hash = found, self._keep()
        self._on_measured(step, found.quality.logloss)

    def steps_left(self, step: int) -> int | None:
        """Count the steps to the next measurement; None where there is one at the end of the epoch only."""
        return self._every_steps - step % self._every_steps if self._every_steps else None

    def is_due(self, step: int) -> bool:
        """Whether there is a measurement after this step, wherever the epoch stands."""
        return self._every_steps > 0 and step % self._every_steps == 0

    @property
    def says_stop(self) -> bool:
        """Whether so many measurements in a row were not better that more training is not worth it."""
        if not self._patience or self.best is None:
            return False
        return sum(check.step > self.best.step for check in self.checks) >= self._patience

    def state(self) -> dict[str, Any]:
        """Plain values that a resumed run needs."""
        best = None if self.best is None else self.best.step
        return {"checks": [asdict(check) for check in self.checks], "best": best, "best_hash": self.best_hash}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.checks = [
            ValidationFigures(**(check | {"quality": Quality(**check["quality"])})) for check in state["checks"]
        ]
        self.best = next((check for check in self.checks if check.step == state["best"]), None)
        self.best_hash = state["best_hash"]
