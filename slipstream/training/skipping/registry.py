"""Which skip criteria there are: every module of `criteria/` with a subclass of `Criterion`."""

from __future__ import annotations

from typing import Final

from slipstream.registry import Registry
from slipstream.training.skipping.criterion import Criterion, SkipRule

CRITERIA: Final[Registry[type[Criterion]]] = Registry(
    "criterion", package="slipstream.training.skipping.criteria", subclass_of="Criterion"
)
"""What decides which samples are left out, by `skip.criterion`."""


def make_criterion(rule: SkipRule) -> Criterion:
    """Make what a rule asks for.

    Raises:
        ValueError: No criterion has the name.
    """
    return CRITERIA.get(rule.criterion).of(rule)
