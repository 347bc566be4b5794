"""Products of all pairs of a sample's vectors, with a backward pass of one product of matrices.

Shape suffixes: B batch, N vectors of a sample, D their width, P = N·(N - 1)/2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pair_products(vectors_BND: Tensor, pairs_P: Tensor) -> Tensor:
    """Give the inner products of pairs of vectors. Shape (B, P).

    On CUDA the gradient is one product of matrices, (G + Gᵀ) V, where autograd makes two and adds them. On a CPU
    autograd's stays: a sum of two products is rounded otherwise, and results are to repeat.

    Args:
        vectors_BND: V.
        pairs_P: Number i·N + j of each pair i > j among all N² products. Integer.
    """
    if vectors_BND.is_cuda:
        products: Tensor = PairProducts.apply(vectors_BND, pairs_P)
        return products
    return _products(vectors_BND, pairs_P)


def _products(vectors_BND: Tensor, pairs_P: Tensor) -> Tensor:
    return torch.bmm(vectors_BND, vectors_BND.transpose(1, 2)).flatten(1).index_select(1, pairs_P)


class PairProducts(torch.autograd.Function):
    """The products, and (G + Gᵀ) V."""

    @staticmethod
    def forward(ctx: Any, vectors_BND: Tensor, pairs_P: Tensor) -> Tensor:
        """Give the products."""
        ctx.save_for_backward(vectors_BND, pairs_P)
        return _products(vectors_BND, pairs_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Give the gradient of the vectors."""
        (gradient_BP,), (vectors_BND, pairs_P) = gradients, ctx.saved_tensors
        num_samples, num_vectors, _ = vectors_BND.shape
        # Pair i·N + j stands at (i, j) of G; its mirror image is j·N + i. No pair is its own.
        rows, columns = pairs_P.div(num_vectors, rounding_mode="floor"), pairs_P.remainder(num_vectors)
        both_ways = gradient_BP.new_zeros(num_samples, num_vectors * num_vectors)
        both_ways.index_copy_(1, pairs_P, gradient_BP)
        both_ways.index_copy_(1, columns * num_vectors + rows, gradient_BP)
        symmetric = both_ways.view(num_samples, num_vectors, num_vectors)
        # under autocast the products, and so their gradients, have fewer bits than the vectors
        return torch.bmm(symmetric, vectors_BND.to(symmetric.dtype)).to(vectors_BND.dtype), None
