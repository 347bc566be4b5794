"""What the published order of training leaves out: keys of the pipeline file that `train.faithful` would not look at.

Nothing that somebody set is ignored without a word, so such keys are refused unless they say what the order does
anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from slipstream.errors import ConfigError
from slipstream.training.skipping.registry import CRITERIA

_NOT_OF_THE_LOOP = (
    *("lr_warmup", "lr_decay", "order", "chunk_batches", "staging_rows", "log_every", "average", "cold_access"),
    *("shuffle_on", "positive_weight", "validate_steps", "patience"),
    *("checkpoint_minutes", "checkpoint_steps"),
)
"""Keys of `[train]`: constant learning rate; no look-ahead, reports, mean of weights or checkpoints."""
_NOT_OF_DROPPING = ("scope", "scorer", "floor", "keep_steps", "reweight", "threshold", "refresh_steps", "window_steps")
"""Keys of `[skip]`: it decides once an epoch, by a threshold it finds itself, and weights nothing."""
SKIP_KEYS = ("probe_share", "sample_ratio", "tolerance")
"""Keys of `[skip]` that mean something in the published order alone."""


def check_published_order(train: Any, skip: Any, *, criterion: str) -> None:
    """Check that the published order can do what sections `train` and `skip` ask for.

    Args:
        train: Section `train`, with `faithful` set.
        skip: Section `skip`.
        criterion: The one in force.

    Raises:
        ConfigError: It knows nothing of the criterion, or would ignore a key; names every such key.
    """
    chosen = CRITERIA.get(criterion)
    if not chosen.is_published:
        published = [name for name in CRITERIA.names() if CRITERIA.get(name).is_published]
        raise ConfigError(
            f"`train.faithful` goes with criterion {' or '.join(published)}, found `skip.criterion` = '{criterion}'",
            hint="set skip.criterion, or leave train.faithful out: the other modes have every criterion",
        )
    ignored = list(_changed("train", train, _NOT_OF_THE_LOOP))
    if chosen.drops:
        ignored += _changed("skip", skip, _NOT_OF_DROPPING)
    if train.checkpoint_minutes == 0:  # that there are none is what it does anyway
        ignored = [key for key in ignored if not key.startswith("`train.checkpoint_minutes`")]
    if ignored:
        raise ConfigError(
            f"`train.faithful` would ignore {', '.join(ignored)}: the published order has no such thing",
            hint="give these keys their defaults, or leave train.faithful out",
        )


def _changed(section: str, options: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Keys that have another value than their default, with it."""
    defaults = {spec.name: spec.default for spec in fields(options)}
    for name in names:
        if (value := getattr(options, name)) != defaults[name]:
            yield f"`{section}.{name}` = {value!r}"
