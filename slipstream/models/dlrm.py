"""DLRM: bottom MLP over the dense values, dot products of every two vectors, top MLP.

Shape suffixes: B batch, F columns, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slipstream.models.model import Model, check_widths

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class DLRM(Model):
    """Click logits from dense values and looked-up rows.

    Source: Naumov et al., arXiv 1906.00091. The last layer gives logits, not probabilities.
    """

    name: str = "dlrm"
    """This model."""
    bottom_mlp: tuple[int, ...] = (512, 256, 64, 16)
    """Layer widths after the dense input; the last must equal `embedding_dim`."""
    top_mlp: tuple[int, ...] = (512, 256, 1)
    """Layer widths after the interaction; the last must be 1."""

    def check(self) -> None:
        """Check widths."""
        check_widths("model.bottom_mlp", self.bottom_mlp, end=self.embedding_dim, end_is="embedding_dim = ")
        check_widths("model.top_mlp", self.top_mlp, end=1)

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make the network: see `Model.build`."""
        return make_dlrm(
            num_dense=num_dense,
            num_columns=num_columns,
            embedding_dim=self.embedding_dim,
            bottom_mlp=self.bottom_mlp,
            top_mlp=self.top_mlp,
        )


def make_dlrm(
    *, num_dense: int, num_columns: int, embedding_dim: int, bottom_mlp: Sequence[int], top_mlp: Sequence[int]
) -> nn.Module:
    """Make the network of DLRM, which TBSM has one of for its time steps.

    Args:
        num_dense: Dense columns.
        num_columns: F.
        embedding_dim: D; also the width the bottom MLP must end in.
        bottom_mlp: Layer widths after the dense input.
        top_mlp: Layer widths after the interaction.

    Returns:
        A module from (dense (B, num_dense), rows (B, F, D)) to (B,) where `top_mlp` ends in 1, else to (B, its width).
    """
    import torch
    from torch import nn

    from slipstream.models.interaction import pair_products
    from slipstream.models.mlp import make_mlp

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom = make_mlp([num_dense, *bottom_mlp], relu_last=True)
            num_vectors = num_columns + 1
            num_pairs = num_vectors * (num_vectors - 1) // 2
            self.top = make_mlp([num_pairs + embedding_dim, *top_mlp], relu_last=False)
            rows, columns = torch.tril_indices(num_vectors, num_vectors, offset=-1)
            self.register_buffer("pairs", rows * num_vectors + columns, persistent=False)

        def forward(self, dense: Tensor, rows_BFD: Tensor) -> Tensor:
            bottom_BD = self.bottom(dense)
            vectors = torch.cat([bottom_BD.unsqueeze(1), rows_BFD], dim=1)
            interactions = pair_products(vectors, self.pairs)  # type: ignore[arg-type]
            logits: Tensor = self.top(torch.cat([bottom_BD, interactions], dim=1))
            return logits.squeeze(1)

    return Network()
