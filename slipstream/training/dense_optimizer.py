"""The optimizer of the dense layers, as few calls over all parameters at once.

torch.optim would do on the CPU; this one takes its learning rate from a tensor, so that a captured CUDA graph can
replay it while the rate changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn


class DenseOptimizer:
    """SGD or element-wise Adagrad: w -= lr g, or s += g² / m, w -= lr g / (sqrt(s) + eps).

    m is the weight of the samples behind g, 1 unless given: one sample of weight m leaves what m samples of weight 1
    would have left in the accumulators, when each of them had come in a batch of its own.

    Args:
        parameters: What to update.
        kind: Rule.
        eps: Added to the root of the accumulator.
        weight_decay: L2 penalty, added to gradients.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        kind: Literal["sgd", "adagrad"],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self._eps, self._weight_decay = eps, weight_decay
        self.state: list[Tensor] = []
        """Accumulators, one per parameter; none for SGD."""
        if kind == "adagrad":
            self.state = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, lr: Tensor, *, sample_weight: Tensor | None = None) -> None:
        """Apply the gradients.

        Args:
            lr: Learning rate, without dimensions, where the parameters live.
            sample_weight: m, without dimensions; None is 1.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if len(gradients) != len(self._parameters):
            raise ValueError("expected a gradient for every parameter; call backward first")
        if self._weight_decay:
            torch._foreach_add_(gradients, self._parameters, alpha=self._weight_decay)
        if self.state:
            counted = gradients if sample_weight is None else torch._foreach_div(gradients, sample_weight.sqrt())
            torch._foreach_addcmul_(self.state, counted, counted)
            scale = torch._foreach_sqrt(self.state)
            torch._foreach_add_(scale, self._eps)
            torch._foreach_div_(gradients, scale)
        torch._foreach_mul_(gradients, lr)
        torch._foreach_add_(self._parameters, gradients, alpha=-1)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None
