"""What a cached bag refuses, in words."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from slipstream.embedding.rules import require_one_process
from slipstream.errors import CapacityError


def too_many_rows(
    num_distinct: int, *, capacity: int, num_embeddings: int, cache_ratio: float, num_waiting: int
) -> CapacityError:
    """Say that a training batch does not fit the cache, and what would help.

    Args:
        num_distinct: Distinct rows of the batch.
        capacity: Rows the cache holds.
        num_embeddings: Rows of the table.
        cache_ratio: As the bag was made with.
        num_waiting: Forwards before it that wait for their optimizer step, and whose rows must stay.
    """
    waiting = ""
    hint = f"raise cache_ratio to at least {_round_up(num_distinct / num_embeddings)}"
    if num_distinct <= capacity:
        waiting = f", beside the rows of {num_waiting} forwards that wait for their optimizer step"
        hint = "take that step, use no_grad or eval mode for what is not trained on, or raise cache_ratio"
    else:
        hint += ", or use a smaller batch"
    return CapacityError(
        f"expected a training batch of at most {capacity} distinct rows "
        f"(cache_ratio {cache_ratio} of {num_embeddings}), found {num_distinct}{waiting}",
        hint=hint,
    )


def refuse_several_processes() -> None:
    """Refuse to train a cache in one of several processes.

    Raises:
        ValueError: A process group of more than one process is initialised.
    """
    require_one_process(
        "a CachedEmbeddingBag",
        remedy="use nn.EmbeddingBag, or train a pipeline with `torchrun -m slipstream train` and train.mode = 'cached'",
    )


def as_counts(counts: ArrayLike | Tensor | None, num_rows: int) -> np.ndarray | None:
    """Give access counts as an array.

    Raises:
        ValueError: They are not one integer, at least 0, for every row.
    """
    if counts is None:
        return None
    array = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
    if array.shape != (num_rows,) or not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        found = f"shape {array.shape} of {array.dtype}"
        raise ValueError(f"expected ids_freq_mapping: {num_rows} integers >= 0, one per row, found {found}")
    return array


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option that is not in its set.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(f"expected {name} in {', '.join(map(repr, choices))}, found {value!r}")


def _round_up(ratio: float) -> float:
    """Round a ratio up to three digits, at most 1, for a person to type in."""
    scale = 10.0 ** (2 - math.floor(math.log10(ratio)))
    return min(1.0, math.ceil(ratio * scale) / scale)
