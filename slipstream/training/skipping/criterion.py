"""What every skip criterion is: a rule that says which samples of a round stay, and how those that stay are weighted.

A criterion is one file: a subclass of `Criterion` in `criteria/`, which its registry finds. A pipeline is checked and
a run is planned by these classes, so their files load neither torch nor polars nor pyarrow at the top; what needs one
of them is imported where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from slipstream.io.samples import Samples
    from slipstream.training.skipping.trackers import RowTracker

Scope = Literal["hot", "all"]
"""Which samples are classified."""
Movement = Literal["net", "per-label"]
"""How staleness measures that a row moves, see `staleness.py`."""
Scorer = Callable[["Samples"], "np.ndarray"]
"""Click probabilities of samples. Shape (n,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipRule:
    """The settings of a criterion. What one of them means to a criterion, its class says."""

    criterion: str
    """Its name in the registry."""
    target_drop: float
    """D: share of the classified samples to drop."""
    scope: Scope = "hot"
    """Which samples are classified, where the criterion leaves a choice."""
    movement: Movement = "per-label"
    """What `stale` measures."""
    alpha: float = 1.0
    """Share of lookups that must be stale; per label, of those that the mean is over."""
    alpha_tables: tuple[int, ...] = ()
    """Table of each watched column, where every table is to have that share by itself; empty: all taken together."""
    threshold: float | None = None
    """T by hand for `stale`; None finds it from D."""
    sample_size: int = 65_536
    """Hot samples the quantile is taken from, by net movement."""
    num_rows: int = 0
    """V, for the linear scorer; 0 asks the model for scores instead."""
    num_dense: int = 0
    """Dense columns, for the linear scorer."""
    padding_slots: tuple[int, ...] = ()
    """Slots that stand for no value, for the linear scorer."""
    floor: float = 0.05
    """Least probability to keep a sample, for `importance` and for `stale` per label."""
    reweight: bool = True
    """Weight kept samples by the inverse of their probability to be kept, where it differs between samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The classified samples of a round, and how many of those before them were dropped."""

    groups: Sequence[Samples]
    """Hot samples, then cold ones where they are classified too; at least one sample in all."""
    classified: int
    """Samples classified in earlier rounds."""
    dropped: int
    """Of those, dropped."""
    score: Scorer
    """The model's predictions."""
    columns: np.ndarray | None = None
    """Columns of slots whose rows are watched; None for all."""

    def __len__(self) -> int:
        """Count the samples of all groups."""
        return sum(map(len, self.groups))

    def labels(self) -> np.ndarray:
        """Labels of all groups, one after the other. Shape (n,), float32."""
        import numpy as np

        return np.concatenate([group.y for group in self.groups])

    def predict(self) -> np.ndarray:
        """Ask the model for click probabilities of all groups; not for a criterion that decides alone. Shape (n,)."""
        import numpy as np

        return np.concatenate([self.score(group) for group in self.groups])

    def watched_slots(self) -> np.ndarray:
        """Slots whose rows are watched, of all groups. Shape (n, columns)."""
        import numpy as np

        slots = [group.X_cat if self.columns is None else group.X_cat[:, self.columns] for group in self.groups]
        return slots[0] if len(slots) == 1 else np.concatenate(slots)

    def num_drop(self, target_drop: float) -> int:
        """How many to drop so that the share is exact over all rounds, whatever was dropped before."""
        return round((self.classified + len(self)) * target_drop) - round(self.classified * target_drop)

    def num_due(self, target_drop: float) -> int:
        """How many to drop to make up for all that was not dropped before; below 0 where too many were."""
        return round(target_drop * (self.classified + len(self))) - self.dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check came to."""

    threshold: float
    """T."""
    stale_rows: int
    """Hot rows that moved less than T in the window; per label, under every label they were looked up with."""
    untouched_rows: int
    """Hot rows that were not looked up in the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which candidates stay."""

    keep: np.ndarray
    """Shape (n,), bool."""
    weights: np.ndarray | None = None
    """Inverse of the probability with which each candidate is kept; None where it is the same for all. Shape (n,),
    float32."""
    finding: Finding | None = None
    """What the last check came to, where it took these samples to find out."""


class Criterion(ABC):
    """One way to choose which samples to leave out.

    Args:
        rule: The settings.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("hot", "all")
    """What it can classify; `skip.scope` chooses, and a comparison takes the last."""
    floor: ClassVar[float] = 0.05
    """What `skip.floor` is where it is left out."""
    drops: ClassVar[bool] = True
    """Whether it ever drops anything."""
    is_published: ClassVar[bool] = False
    """Whether the published order has it, so that `train.faithful` can honour it."""
    watches_rows: ClassVar[bool] = False
    """Whether it goes by how rows move: it then has a tracker, and begins with the first window that closes."""
    decides_alone: bool = True
    """Whether it can decide about a round while the model still trains on the one before."""

    def __init__(self, rule: SkipRule) -> None:
        self.rule = rule

    @classmethod
    def of(cls, rule: SkipRule) -> Criterion:
        """Make one from settings; where settings choose between ways, the right one of them."""
        return cls(rule)

    def tracker_bytes(self, *, embedding_dim: int) -> int:
        """Count the accelerator bytes that it keeps beside each hot row of `embedding_dim` values."""
        return 0

    def make_tracker(self, hot_rows: Tensor, *, padding_slots: np.ndarray | None = None) -> RowTracker:
        """Make what watches the hot tier; asked only where `watches_rows`.

        Args:
            hot_rows: View of the hot tier. Shape (H, D).
            padding_slots: Hot rows that stand for no id, and never move; None for none. Integer.
        """
        raise NotImplementedError(f"`{type(self).__name__}` watches no rows")

    def watch(self, shown: np.ndarray) -> Finding | None:
        """Go by what a window showed from now on; asked only where `watches_rows`.

        Args:
            shown: What the tracker gave.

        Returns:
            What the check came to, where that is known without samples.
        """
        raise NotImplementedError(f"`{type(self).__name__}` watches no rows")

    def learn(self, groups: Sequence[Samples], *, rng: np.random.Generator) -> None:
        """See all samples of a round, classified or not, before anything is decided about it.

        Args:
            groups: Hot samples, then cold ones; either may be missing.
            rng: Draws.
        """
        return

    @abstractmethod
    def choose(self, candidates: Candidates, *, rng: np.random.Generator) -> Choice:
        """Decide about the classified samples of a round.

        Args:
            candidates: The samples.
            rng: Draws.
        """

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Give everything a resumed run needs: plain values, and arrays."""
        return {}, {}

    def restore(self, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave; there may be more beside it."""
        return
