"""DCNv2: layers that cross the input with itself, and an MLP behind or beside them.

Shape suffixes: B batch, F looked-up columns, D embedding_dim, I = num_dense + F·D width of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slipstream.models.model import Model, check_widths
from slipstream.options import require

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class DCNv2(Model):
    """Cross layers x_next = x_0 * (W x + b) + x over [dense values, looked-up rows], and an MLP.

    After n cross layers, products of up to n + 1 inputs are there, each with a weight of its own. Dense values go in as
    they are, so choose a `preprocess.dense_transform` that keeps them small.

    Source: Wang et al., arXiv 2008.13535, without the mixture of experts. Weights start as Xavier's normal draws them
        and biases at zero, as in FuxiCTR, which makes a vector of each dense value first; the paper does not.
    """

    name: str = "dcnv2"
    """This model."""
    cross_layers: int = 3
    """Cross layers."""
    cross_rank: int = 0
    """Rank of their matrices W = U V, which are then U and V of this rank; 0 has them whole."""
    structure: Literal["stacked", "parallel"] = "stacked"
    """`stacked`: the MLP takes what the cross layers give; `parallel`: it takes the input, a last layer joins both."""
    deep_mlp: tuple[int, ...] = (512, 256)
    """Hidden widths of the MLP; a layer of width 1 follows."""

    def check(self) -> None:
        """Check ranges."""
        require(self.cross_layers >= 1, "model.cross_layers", "at least 1", self.cross_layers)
        require(self.cross_rank >= 0, "model.cross_rank", "at least 0", self.cross_rank)
        check_widths("model.deep_mlp", self.deep_mlp)

    def build(self, *, num_dense: int, num_columns: int) -> nn.Module:
        """Make the network: see `Model.build`."""
        return _make_network(self, width=num_dense + num_columns * self.embedding_dim)


def _make_network(options: DCNv2, *, width: int) -> nn.Module:
    import torch
    from torch import nn

    from slipstream.models.mlp import make_mlp

    is_parallel = options.structure == "parallel"

    def make_cross_layer() -> nn.Module:
        if not options.cross_rank:
            return make_mlp([width, width], relu_last=False, zero_bias=True)[0]
        narrow = nn.Linear(width, options.cross_rank, bias=False)
        nn.init.xavier_normal_(narrow.weight)
        return nn.Sequential(narrow, *make_mlp([options.cross_rank, width], relu_last=False, zero_bias=True))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.ModuleList(make_cross_layer() for _ in range(options.cross_layers))
            self.deep = make_mlp([width, *options.deep_mlp], relu_last=True, zero_bias=True)
            joined = options.deep_mlp[-1] + (width if is_parallel else 0)
            self.last = make_mlp([joined, 1], relu_last=False, zero_bias=True)

        def forward(self, dense: Tensor, rows_BFD: Tensor) -> Tensor:
            input_BI = torch.cat([dense, rows_BFD.flatten(1)], dim=1)
            crossed_BI = input_BI
            for layer in self.cross:
                crossed_BI = input_BI * layer(crossed_BI) + crossed_BI
            if is_parallel:
                joined = torch.cat([crossed_BI, self.deep(input_BI)], dim=1)
            else:
                joined = self.deep(crossed_BI)
            logits: Tensor = self.last(joined)
            return logits.squeeze(1)

    return Network()
