"""DLRM: bottom MLP, dot interaction, top MLP.

Shape suffixes: B batch, T tables, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class DLRM(nn.Module):
    """Click logits from dense values and pooled rows.

    Args:
        num_dense: Dense columns.
        num_tables: T.
        embedding_dim: D; also the width the bottom MLP must end in.
        bottom_mlp: Layer widths after the dense input.
        top_mlp: Layer widths after the interaction; the last is 1.

    Source: Naumov et al., arXiv 1906.00091, with the initial weights of its reference code: normal, of
        variance 2/(in + out) for weights and 1/out for biases. The last layer gives logits, not probabilities.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_tables: int,
        embedding_dim: int,
        bottom_mlp: Sequence[int],
        top_mlp: Sequence[int],
    ) -> None:
        super().__init__()
        if bottom_mlp[-1] != embedding_dim:
            raise ValueError(f"expected a bottom MLP that ends in {embedding_dim}, found {list(bottom_mlp)}")
        self.bottom = make_mlp([num_dense, *bottom_mlp], relu_last=True)
        num_vectors = num_tables + 1
        num_pairs = num_vectors * (num_vectors - 1) // 2
        self.top = make_mlp([num_pairs + embedding_dim, *top_mlp], relu_last=False)
        rows, columns = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pairs", rows * num_vectors + columns, persistent=False)

    def forward(self, dense: Tensor, pooled_BTD: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense: Transformed dense values. Shape (B, num_dense), float32.
            pooled_BTD: One vector per table. Shape (B, T, D), float32.

        Returns:
            Shape (B,), float32.
        """
        bottom_BD = self.bottom(dense)
        vectors = torch.cat([bottom_BD.unsqueeze(1), pooled_BTD], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        interactions = products.index_select(1, self.pairs)  # type: ignore[arg-type]
        logits: Tensor = self.top(torch.cat([bottom_BD, interactions], dim=1))
        return logits.squeeze(1)


def make_mlp(widths: Sequence[int], *, relu_last: bool) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised as DLRM's reference does."""
    layers: list[nn.Module] = []
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(width_in, width_out)
        nn.init.normal_(linear.weight, std=(2.0 / (width_in + width_out)) ** 0.5)
        nn.init.normal_(linear.bias, std=(1.0 / width_out) ** 0.5)
        layers.append(linear)
        if relu_last or index < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
