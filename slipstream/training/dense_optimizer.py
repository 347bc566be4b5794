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
    """SGD or element-wise Adagrad: w -= lr g, or s += g², w -= lr g / (sqrt(s) + eps).

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
    def step(self, lr: Tensor) -> None:
        """Apply the gradients. `lr` has no dimensions and lives where the parameters do."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if len(gradients) != len(self._parameters):
            raise ValueError("expected a gradient for every parameter; call backward first")
        if self._weight_decay:
            torch._foreach_add_(gradients, self._parameters, alpha=self._weight_decay)
        if self.state:
            torch._foreach_addcmul_(self.state, gradients, gradients)
            scale = torch._foreach_sqrt(self.state)
            torch._foreach_add_(scale, self._eps)
            torch._foreach_div_(gradients, scale)
        torch._foreach_mul_(gradients, lr)
        torch._foreach_add_(self._parameters, gradients, alpha=-1)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None
