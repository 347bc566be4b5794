"""Section `skip` of the pipeline file: which samples are left out, and by what rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from slipstream.errors import ConfigError
from slipstream.options import later, require
from slipstream.registry import ChoiceOf
from slipstream.training.skipping.criterion import Movement, Scope


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipConfig:
    """Which samples are left out, and by what rule."""

    criterion: Annotated[str, ChoiceOf("slipstream.training.skipping.registry:CRITERIA")] = "stale"
    """What decides which samples are dropped."""
    target_drop: float = 0.3
    """D: share of the classified samples to drop."""
    scope: Scope = "hot"
    """Samples that are classified; `stale` always means hot ones, whatever stands here."""
    movement: Movement = "per-label"
    """What `stale` measures: `per-label` how hard a lookup pulls at its row, by clicked samples and by the others, so
    that both cannot cancel; `net` how far the row came between two snapshots, as published. `train.faithful` always
    means `net`."""
    scorer: Literal["linear", "model"] = "linear"
    """Who guesses the error for `importance`: `linear` a logistic regression on rows and dense values that learns
    beside the model at about a microsecond a sample, `model` a forward pass over the coming samples."""
    floor: float | None = None
    """Least probability with which `importance`, and `stale` per label, keep a sample: the inverse of the largest
    weight. Left out, .2 for `importance` and .05 for `stale`."""
    keep_steps: bool = later(False)
    """Make batches smaller by D while samples of their kind are dropped, so that as many steps are taken as without
    skipping: on a CPU, where a step costs what its samples cost, that keeps more of the quality. On a GPU, where a
    small batch costs as much as a large one, steps are what skipping saves. Not with `skip.threshold`."""
    reweight: bool = True
    """Let samples that `negative`, `importance`, and `stale` per label keep with probability q count as 1/q samples."""
    alpha: float = 1.0
    """Share of a sample's lookups that must be stale for it to be dropped, in (0, 1]; per label, the share of its rows,
    those pulled at least, whose mean decides."""
    alpha_per: Literal["sample", "table"] = later("sample")
    """What α is a share of, by `net` movement: all lookups of a `sample`, or those of each `table`, all of which must
    have as many. The published rule for TBSM, at least 4 of the 21 lookups of every table, is `table` and α = 4/21."""
    threshold: float | None = None
    """T given by hand: a row is stale when it moved by less; left out, D decides."""
    warmup_steps: int = 0
    """Steps before the first window opens."""
    refresh_steps: int = 0
    """Steps between re-checks; 0 makes six in the first epoch."""
    window_steps: int = 0
    """Steps before a check that rows are watched for; 0 uses the whole time since the last check."""
    sample_size: int = 65_536
    """Hot samples the threshold is taken from, by `net` movement; per label it is taken from all of a round."""
    sample_ratio: float = 0.0
    """The same as a share of all hot samples, with `train.faithful`; 0 takes `skip.sample_size`."""
    probe_share: float = 0.015
    """p: share of hot batches between the two snapshots of `train.faithful`."""
    tolerance: float = 0.08
    """How far from D the bisection of `train.faithful` may stop; where it finds nothing as near, none is dropped."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 <= self.target_drop < 1, "skip.target_drop", "in [0, 1)", self.target_drop)
        require(self.floor is None or 0 < self.floor <= 1, "skip.floor", "in (0, 1]", self.floor)
        if self.keep_steps and self.threshold is not None:
            raise ConfigError(
                "`skip.keep_steps` makes batches smaller by the share that is dropped, which a `skip.threshold` by "
                "hand does not say",
                hint="leave one of the two out; skip.target_drop says the share",
            )
        require(0 < self.alpha <= 1, "skip.alpha", "in (0, 1]", self.alpha)
        require(self.threshold is None or self.threshold >= 0, "skip.threshold", "at least 0", self.threshold)
        for name in ("warmup_steps", "refresh_steps", "window_steps"):
            require(getattr(self, name) >= 0, f"skip.{name}", "at least 0", getattr(self, name))
        require(self.sample_size >= 1, "skip.sample_size", "at least 1", self.sample_size)
        for name in ("sample_ratio", "probe_share", "tolerance"):
            require(0 <= getattr(self, name) < 1, f"skip.{name}", "in [0, 1)", getattr(self, name))
