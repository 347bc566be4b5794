"""DeepFM: a factorization machine and an MLP over the same vectors, their logits added.

Shape suffixes: B batch, F fields (dense columns, then looked-up ones), D embedding_dim, W = D + 1 row width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.models.model import Model, check_widths

if TYPE_CHECKING:
    from torch import Tensor, nn


_SMALL = 0.01
"""Scale of initial vectors and weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepFM(Model):
    """Weights of single fields, dot products of every two fields' vectors, and an MLP over all vectors.

    A row has `embedding_dim` + 1 values: the vector that factorization machine and MLP share, then the first-order
    weight of what the row stands for, so that weights lie in tiers, are cached and rounded as vectors are. A dense
    column is a field too: its vector and its weight are the model's own, times the column's value.

    Source: Guo et al., arXiv 1703.04247. Dense columns as continuous fields are treated there, and in FuxiCTR; dropout
        is left out. Weights start as Xavier's normal draws them and biases at zero, as in FuxiCTR.
    """

    name: str = "deepfm"
    """This model."""
    deep_mlp: tuple[int, ...] = (400, 400, 400)
    """Hidden widths of the MLP over all vectors; a layer of width 1 follows."""

    def check(self) -> None:
        """Check widths."""
        check_widths("model.deep_mlp", self.deep_mlp)

    @property
    def row_width(self) -> int:
        """The vector and the first-order weight."""
        return self.embedding_dim + 1

    def initial_bound(self, num_rows: int) -> float:
        """Give a small bound, whatever the table.

        Logits add up dot products of all pairs. With values as large as DLRM's in tables of few rows they start as
        noise of a few units, which training has to undo first.
        """
        return _SMALL

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make the network: see `Model.build`."""
        return _make_network(self, num_dense=num_dense, num_fields=num_dense + num_columns)


def _make_network(options: DeepFM, *, num_dense: int, num_fields: int) -> nn.Module:
    import torch
    from torch import nn

    from slipstream.models.mlp import make_mlp

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense_rows = nn.Parameter(_SMALL * torch.randn(num_dense, options.row_width))
            widths = [num_fields * options.embedding_dim, *options.deep_mlp, 1]
            self.deep = make_mlp(widths, relu_last=False, zero_bias=True)

        def forward(self, dense: Tensor, rows_BFW: Tensor) -> Tensor:
            fields_BFW = torch.cat([dense.unsqueeze(2) * self.dense_rows, rows_BFW], dim=1)
            vectors_BFD, weights_BF = fields_BFW[:, :, :-1], fields_BFW[:, :, -1]
            # (sum of vectors)² has every pair twice and every vector with itself once: no loop over pairs
            pairs_BD = (vectors_BFD.sum(dim=1).square() - vectors_BFD.square().sum(dim=1)) / 2
            deep: Tensor = self.deep(vectors_BFD.flatten(1))
            return weights_BF.sum(dim=1) + pairs_BD.sum(dim=1) + deep.squeeze(1)

    return Network()
