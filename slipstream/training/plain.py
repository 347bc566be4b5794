"""Training as everybody would write it: one `nn.EmbeddingBag` per table, autograd, and the update rule written out.

What tiers, caches, look-ahead, sorted duplicates and fused updates are compared with. It shares nothing with them but
the network around the tables, which is made of torch's own modules. Rules are written as their papers have them, in
float32; `torch.optim` has the same for SGD, Adagrad and sparse Adam, rounded differently (fused multiplications), and
none for row-wise Adagrad.

A row's gradients are summed in the order of its lookups, sample by sample. `coalesce` would leave the order to a sort
that is not stable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.models.model import Model
from slipstream.schema import Bag


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainRule:
    """An optimizer, as `train.optimizer` and its options name it."""

    optimizer: str
    eps: float
    weight_decay: float
    bf16: bool = False
    """Whether the network computes in bfloat16, by autocast."""


@dataclass(slots=True)
class _Kept:
    """What a rule keeps of one parameter."""

    squares: Tensor | None
    """Sums of squares, or the second moment of Adam."""
    first: Tensor | None
    """The first moment of Adam."""


class PlainTraining:
    """All rows of all tables in plain modules.

    Args:
        network: The model, and how its rows start.
        rows_per_table: Rows of each table, in order.
        column_tables: Table of each column.
        padding_rows: Tables with a row that starts as zero, and that row.
        bags: Columns whose rows are pooled.
        num_dense: Dense columns.
        rule: How parameters are updated.
        seed: Of initial weights: rows table by table, evenly within the model's bound; then the network's.
    """

    def __init__(
        self,
        *,
        network: Model,
        rows_per_table: Mapping[str, int],
        column_tables: Sequence[str],
        padding_rows: Mapping[str, int],
        bags: Sequence[Bag] = (),
        num_dense: int,
        rule: PlainRule,
        seed: int,
    ) -> None:
        self._rule, self._num_steps = rule, 0
        self._bag_at = {bag.columns[0]: bag for bag in bags}
        self._padding_at = {at: padding_rows[column_tables[at]] for bag in bags for at in bag.columns}
        inside = {column for bag in bags for column in bag.columns[1:]}
        self._fields = [at for at in range(len(column_tables)) if at not in inside]
        self._columns = {name: [at for at, of in enumerate(column_tables) if of == name] for name in rows_per_table}
        generator = torch.Generator().manual_seed(seed)
        self.bags: dict[str, nn.EmbeddingBag] = {}
        """By table."""
        for name, num_rows in rows_per_table.items():
            bound = network.initial_bound(num_rows)
            weight = torch.empty(num_rows, network.row_width).uniform_(-bound, bound, generator=generator)
            if name in padding_rows:
                weight[padding_rows[name]] = 0
            self.bags[name] = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True)
        torch.manual_seed(seed)
        self.network = network.build(num_dense=num_dense, num_columns=len(self._fields))
        """The dense layers."""
        by_row = rule.optimizer == "rowwise_adagrad"
        self._kept_of_rows = {name: _keep(bag.weight, rule, by_row=by_row) for name, bag in self.bags.items()}
        self._kept_of_layers = [_keep(parameter, rule) for parameter in self.network.parameters()]

    def step(
        self, dense: Tensor, rows_BF: Tensor, labels: Tensor, weights: Tensor | None, *, lr: float, divisor: int
    ) -> None:
        """Train on one batch.

        Args:
            dense: Shape (B, dense columns).
            rows_BF: Row of its table that each lookup goes to. Shape (B, F), int64.
            labels: Shape (B,).
            weights: Of samples; None is 1. A sample of weight w counts as w samples. Shape (B,).
            lr: Learning rate.
            divisor: What the sum of losses is divided by: samples of a full batch, which the last may fall short of.
        """
        self._num_steps += 1
        looked_up: dict[int, Tensor] = {}
        for name, columns in self._columns.items():
            # one bag per lookup, sample by sample and in each the columns of the table
            vectors = self.bags[name](rows_BF[:, columns].reshape(-1, 1)).view(len(rows_BF), len(columns), -1)
            for at, column in enumerate(columns):
                looked_up[column] = vectors[:, at]
        fields = torch.stack([self._pool(at, looked_up, rows_BF) for at in self._fields], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._rule.bf16):
            logits = self.network(dense, fields)
        loss = binary_cross_entropy_with_logits(logits.float(), labels, weight=weights, reduction="sum")
        self.network.zero_grad()
        for bag in self.bags.values():
            bag.zero_grad()
        (loss / divisor).backward()
        rate = torch.tensor(lr)
        with torch.no_grad():
            self._update_layers(rate, weights)
            for name, columns in self._columns.items():
                self._update_rows(name, rate, None if weights is None else weights.repeat_interleave(len(columns)))

    def _pool(self, at: int, looked_up: Mapping[int, Tensor], rows_BF: Tensor) -> Tensor:
        """Give the vector of a column, or of the bag that begins there. Shape (B, D)."""
        if at not in self._bag_at:
            return looked_up[at]
        pooled, counts = torch.zeros_like(looked_up[at]), torch.zeros(len(rows_BF), 1)
        for column in self._bag_at[at].columns:
            is_value = (rows_BF[:, column] != self._padding_at[column]).unsqueeze(1)
            pooled = torch.where(is_value, pooled + looked_up[column], pooled)
            counts = counts + is_value
        return pooled if self._bag_at[at].pooling == "sum" else pooled / counts.clamp(min=1)

    def _update_layers(self, rate: Tensor, weights: Tensor | None) -> None:
        behind = None if weights is None else weights.square().sum() / weights.sum()
        for parameter, kept in zip(self.network.parameters(), self._kept_of_layers, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad.add(parameter, alpha=self._rule.weight_decay)
            parameter.sub_(self._direction(gradient, kept, behind, by_row=False) * rate)

    def _update_rows(self, name: str, rate: Tensor, weights: Tensor | None) -> None:
        """Move the rows that were looked up, and none else.

        Args:
            name: The table.
            rate: Learning rate.
            weights: Of the sample behind each lookup. Shape (L,).
        """
        weight, kept = self.bags[name].weight, self._kept_of_rows[name]
        assert weight.grad is not None
        rows, inverse = torch.unique(weight.grad._indices()[0], return_inverse=True)
        gradient = torch.zeros(len(rows), weight.shape[1]).index_add_(0, inverse, weight.grad._values())
        behind = None
        if weights is not None:
            sums, squares = (
                torch.zeros(len(rows)).index_add_(0, inverse, each) for each in (weights, weights.square())
            )
            behind = squares / sums
        part = _Kept(*(None if one is None else one[rows] for one in (kept.squares, kept.first)))
        moves = self._direction(gradient, part, behind, by_row=self._rule.optimizer == "rowwise_adagrad") * rate
        weight[rows] = weight[rows] - moves
        for one, advanced in ((kept.squares, part.squares), (kept.first, part.first)):
            if one is not None and advanced is not None:
                one[rows] = advanced

    def _direction(self, gradient: Tensor, kept: _Kept, behind: Tensor | None, *, by_row: bool) -> Tensor:
        """Find which way to go, and advance what is kept.

        Args:
            gradient: g. Shape (U, …).
            kept: Of the same parameters.
            behind: m, the weight of the samples behind each gradient; squares count as g² / m. None is 1.
            by_row: Whether there is one square per row.
        """
        rule, eps = self._rule.optimizer, self._rule.eps
        if behind is not None and behind.dim() and not by_row:
            behind = behind.unsqueeze(1)
        if kept.squares is None:
            return gradient
        if rule == "adam":
            assert kept.first is not None
            kept.first.lerp_(gradient, 1 - 0.9)
            kept.squares.lerp_(gradient.square() if behind is None else gradient.square() / behind, 1 - 0.999)
            steps = torch.tensor(self._num_steps, dtype=torch.float64)
            correction = (1 - 0.999**steps).sqrt() / (1 - 0.9**steps)
            return kept.first * correction / (kept.squares.sqrt() + eps)
        if by_row:
            squares = gradient.square().mean(dim=1)
            kept.squares += squares if behind is None else squares / behind
            return gradient / (kept.squares.sqrt() + eps).unsqueeze(1)
        counted = gradient if behind is None else gradient / behind.sqrt()
        kept.squares.addcmul_(counted, counted)
        return gradient / (kept.squares.sqrt() + eps)


def _keep(parameter: Tensor, rule: PlainRule, *, by_row: bool = False) -> _Kept:
    shape = parameter.shape[:1] if by_row else parameter.shape
    squares = None if rule.optimizer == "sgd" else torch.zeros(shape)
    return _Kept(squares, torch.zeros(shape) if rule.optimizer == "adam" else None)
