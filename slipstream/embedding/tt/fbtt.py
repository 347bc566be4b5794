"""Tensor-train bags under the names and calls of FBTT-Embedding, so that only an import line has to change.

    from slipstream.embedding.tt.fbtt import OptimType, TTEmbeddingBag, TableBatchedTTEmbeddingBag

What differs where the original would go wrong or cannot: it runs on a CPU, for any embedding_dim; of the optimizers
that the original takes for Adagrad without a word, Adam is Adam and the others are refused; and offsets are those of
`nn.EmbeddingBag`, as the original's own documentation shows them. Its code wants the end of the last bag too: say
`include_last_offset=True` for that.

Source: facebookresearch/FBTT-Embedding, README.md and the signatures of tt_embeddings_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, unique
from typing import Any

import torch
from torch import Tensor

from slipstream.embedding.tt import bag
from slipstream.embedding.tt.shapes import suggested_tt_shapes, tt_to_dense
from slipstream.embedding.tt.tables import TTTables

__all__ = ["OptimType", "TTEmbeddingBag", "TableBatchedTTEmbeddingBag", "suggested_tt_shapes", "tt_matrix_to_full"]


@unique
class OptimType(Enum):
    """Optimizers of the fused update."""

    SGD = "sgd"
    EXACT_SGD = "exact_sgd"
    LAMB = "lamb"
    ADAM = "adam"
    EXACT_ADAGRAD = "exact_adagrad"
    EXACT_ROWWISE_ADAGRAD = "exact_row_wise_adagrad"
    LARS_SGD = "lars_sgd"
    PARTIAL_ROWWISE_ADAM = "partial_row_wise_adam"
    PARTIAL_ROWWISE_LAMB = "partial_row_wise_lamb"

    def __str__(self) -> str:
        return self.value


_NAIVE = "naive-uniform"
_RULES: dict[OptimType, str] = {
    OptimType.SGD: "sgd",
    OptimType.EXACT_SGD: "sgd",
    OptimType.EXACT_ADAGRAD: "adagrad",
    OptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
    OptimType.ADAM: "adam",
}


class TTEmbeddingBag(bag.TTEmbeddingBag):
    """`slipstream.embedding.TTEmbeddingBag` with FBTT's calls.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Columns of the table.
        *shapes: By position, tt_ranks, tt_p_shapes and tt_q_shapes, as in FBTT's code; or, where tt_ranks is given by
            name, tt_p_shapes and tt_q_shapes, as in its documentation.
        tt_ranks: Inner ranks.
        tt_p_shapes: Row factors.
        tt_q_shapes: Column factors.
        optimizer: Of the fused update, an `OptimType`.
        weight_dist: As for `slipstream.embedding.TTEmbeddingBag`, or "naive-uniform": every core from
            uniform(0, 1 / √num_embeddings).
        enforce_embedding_dim: Of no effect: the product of the column factors is always embedding_dim, where FBTT
            rounds it up and then stops.
        **options: As for `slipstream.embedding.TTEmbeddingBag`.

    Raises:
        ValueError: The optimizer is one that FBTT names and neither has, or a shape does not fit.
        TypeError: More shapes than there are.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *shapes: Sequence[int] | None,
        tt_ranks: Sequence[int] | None = None,
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        optimizer: OptimType = OptimType.SGD,
        weight_dist: str = "approx-normal",
        enforce_embedding_dim: bool = False,
        **options: Any,
    ) -> None:
        sizes = (num_embeddings, embedding_dim, *_sort_shapes(shapes, tt_ranks, tt_p_shapes, tt_q_shapes))
        super().__init__(*sizes, optimizer=_rule_of(optimizer), weight_dist=_known(weight_dist), **options)
        _redraw(self, weight_dist, options.get("generator"))

    def forward(
        self,
        input: Tensor,  # noqa: A002 (its name in nn.EmbeddingBag)
        offsets: Tensor | None = None,
        warmup: bool | Tensor | None = None,
    ) -> Tensor:
        """Look up and pool; the third argument has no effect, as in FBTT, unless it is per_sample_weights.

        Raises:
            ValueError: The offsets end with the number of lookups, and nothing says that they are meant to.
        """
        is_open = not self.include_last_offset and offsets is not None and offsets.numel() > 1
        if is_open and offsets is not None and int(offsets[-1]) == input.numel():
            raise ValueError(
                f"expected one offset a bag, found {offsets.numel()} of which the last is {input.numel()}, the number "
                "of lookups: FBTT's code passes B + 1 offsets; construct the bag with include_last_offset=True for that"
            )
        return super().forward(input, offsets, warmup if isinstance(warmup, Tensor) else None)

    def get_params(self) -> list[Tensor]:
        """Give the cores."""
        return list(self.tt_cores)


class TableBatchedTTEmbeddingBag(bag.BatchedTTEmbeddingBags):
    """`slipstream.embedding.BatchedTTEmbeddingBags` with FBTT's calls; offsets end with the number of lookups.

    Args:
        num_tables: How many tables.
        num_embeddings: Rows of each.
        embedding_dim: Columns of each.
        *shapes: As for `TTEmbeddingBag`.
        tt_ranks: Inner ranks.
        tt_p_shapes: Row factors.
        tt_q_shapes: Column factors.
        optimizer: Of the fused update.
        weight_dist: As for `TTEmbeddingBag`.
        enforce_embedding_dim: As for `TTEmbeddingBag`.
        **options: As for `slipstream.embedding.BatchedTTEmbeddingBags`.
    """

    def __init__(
        self,
        num_tables: int,
        num_embeddings: int,
        embedding_dim: int,
        *shapes: Sequence[int] | None,
        tt_ranks: Sequence[int] | None = None,
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        optimizer: OptimType = OptimType.SGD,
        weight_dist: str = "approx-normal",
        enforce_embedding_dim: bool = False,
        **options: Any,
    ) -> None:
        sizes = (num_tables, num_embeddings, embedding_dim, *_sort_shapes(shapes, tt_ranks, tt_p_shapes, tt_q_shapes))
        super().__init__(*sizes, optimizer=_rule_of(optimizer), weight_dist=_known(weight_dist), **options)
        _redraw(self, weight_dist, options.get("generator"))


def tt_matrix_to_full(
    tt_p_shapes: Sequence[int],
    tt_q_shapes: Sequence[int],
    tt_ranks: Sequence[int],
    tt_cores: Sequence[Tensor],
    tt_permute: Sequence[int] | None = None,
) -> Tensor:
    """Multiply cores out into the whole table, shape (prod(p), prod(q)).

    Args:
        tt_p_shapes: Row factors.
        tt_q_shapes: Column factors.
        tt_ranks: Inner ranks, or d + 1 integers with the outer ones.
        tt_cores: One tensor a level, of one table.
        tt_permute: Order of a core's axes among (r_k, p_k, q_k, r_{k+1}), one that undoes itself; `[1, 0, 2, 3]` for
            the cores of a bag, which may come with their axes merged as FBTT stores them. None for cores of four axes
            in the order (r_k, p_k, q_k, r_{k+1}).

    Raises:
        ValueError: A core has another number of entries or other axes, or the order does not undo itself.
    """
    ranks = [1, *tt_ranks, 1] if len(tt_ranks) == len(tt_p_shapes) - 1 else list(tt_ranks)
    order = list(range(4)) if tt_permute is None else list(tt_permute)
    if sorted(order) != [0, 1, 2, 3] or any(order[axis] != at for at, axis in enumerate(order)):
        raise ValueError(f"expected an order of four axes that undoes itself, as [1, 0, 2, 3] does, found {order}")
    cores = []
    for at, core in enumerate(tt_cores):
        sizes = (ranks[at], tt_p_shapes[at], tt_q_shapes[at], ranks[at + 1])
        shape = tuple(sizes[axis] for axis in order)
        is_unordered = tt_permute is None and tuple(core.shape) != shape
        if is_unordered or core.numel() != torch.Size(shape).numel():
            hint = "; for the cores of a bag, pass tt_permute=[1, 0, 2, 3]" if is_unordered else ""
            raise ValueError(f"expected core {at} of {shape} entries, found shape {tuple(core.shape)}{hint}")
        # back to (r, p, q, r'), then rows first: the order in which the cores of a bag lie
        cores.append(core.reshape(shape).permute(order).transpose(0, 1))
    return tt_to_dense(cores)


def _sort_shapes(
    shapes: Sequence[Sequence[int] | None],
    ranks: Sequence[int] | None,
    row_shapes: Sequence[int] | None,
    column_shapes: Sequence[int] | None,
) -> tuple[Sequence[int], Sequence[int] | None, Sequence[int] | None]:
    """Tell ranks, row factors and column factors apart, given by position or by name."""
    given = list(shapes)
    if ranks is None:
        ranks = given.pop(0) if given else None
    if ranks is None:
        raise TypeError("expected tt_ranks, found none: pass the inner ranks, one fewer than cores")
    if len(given) > 2:
        raise TypeError(f"expected tt_p_shapes and tt_q_shapes after tt_ranks, found {len(given)} more arguments")
    given += [None] * (2 - len(given))
    return ranks, given[0] if row_shapes is None else row_shapes, given[1] if column_shapes is None else column_shapes


def _rule_of(optimizer: OptimType) -> str:
    if optimizer not in _RULES:
        known = ", ".join(f"OptimType.{known.name}" for known in _RULES)
        raise ValueError(
            f"expected one of {known}, found {optimizer!r}: FBTT names it too, and computes Adagrad instead"
        )
    return _RULES[optimizer]


def _known(weight_dist: str) -> Any:
    return "uniform" if weight_dist == _NAIVE else weight_dist


@torch.no_grad()
def _redraw(tables: TTTables, weight_dist: str, generator: torch.Generator | None) -> None:
    """Draw the cores anew where FBTT's distribution is none of ours."""
    if weight_dist != _NAIVE:
        return
    for core in tables.tt_cores:
        drawn = torch.rand(core.shape, dtype=torch.float64, generator=generator)
        core.copy_(drawn / tables.num_embeddings**0.5)
