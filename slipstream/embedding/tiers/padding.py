"""Which lookups of a batch stand for no value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedColumns:
    """Columns whose samples may have nothing to look up, and the slot that says so."""

    columns: np.ndarray
    """Numbers of the columns. Shape (P,), int64."""
    slots: np.ndarray
    """The padding slot of each. Shape (P,), int64."""
    is_pooled: bool
    """Whether steps must know which lookups are values, since rows are pooled."""

    def find_values(self, slots: np.ndarray) -> np.ndarray:
        """Say which lookups of the padded columns are values.

        Args:
            slots: Of all columns. Shape (B, T), integer.

        Returns:
            Shape (B, P), bool.
        """
        is_value: np.ndarray = slots[:, self.columns] != self.slots
        return is_value

    def count(self, is_value: np.ndarray, *, stop: int) -> int:
        """Count lookups of padding whose slot is below `stop`; `is_value` is as `find_values` gave it."""
        return int(np.count_nonzero(~is_value[:, self.slots < stop]))
