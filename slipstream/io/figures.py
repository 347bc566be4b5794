"""What the counts of a manifest mean, written once as types."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class FitFigures:
    """What training amounted to, evaluation left out."""

    steps: int
    hot_steps: int
    """Steps on batches of hot samples alone."""
    samples_seen: int
    samples_dropped: int
    samples_classified: int
    """Samples that the skip criterion was applied to."""
    drop_asked: float
    """D: share of the classified samples to drop; 0 without a criterion."""
    drop_achieved: float
    threshold: float | None
    """T in force at the end, for criteria that have one."""
    samples_per_second: float
    train_seconds: float
    bytes_to_device: int
    bytes_to_host: int
    hit_ratio: float
    """Share of lookups that found their row on the device."""
    bytes_per_tier: dict[str, int]
    """By tier: hot, staging, cold; where there are any, what watches rows move, and tensor-train cores."""
    sync_bytes: int | None = None
    """Bytes of whole-table copies, in the published order."""
    sync_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return them as they stand in a manifest: what the published order alone has is left out of others."""
        fields = asdict(self)
        left_out = {"sync_bytes", "sync_seconds"} if self.sync_bytes is None else set()
        return {name: value for name, value in fields.items() if name not in left_out}
