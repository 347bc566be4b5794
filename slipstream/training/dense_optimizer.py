"""The optimizer of the dense layers: the rule of the rows, each element for itself.

torch.optim would do on the CPU; this one takes learning rate and count of steps from tensors, so that a captured CUDA
graph can replay it while they change.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.embedding.rules import OPTIMIZERS


class DenseOptimizer:
    """Updates parameters by a rule of `slipstream.embedding.rules`, applied element by element.

    Args:
        parameters: What to update, all of one dtype on one device.
        optimizer: Name of the rule of the rows; these follow by its `elementwise`.
        eps: Of the rule.
        weight_decay: L2 penalty, added to gradients.
        at_once: Whether the rule sees all gradients in one tensor, which spares launches and calls, or parameter by
            parameter, which spares a copy; to the bit the same. None: at once, but for a rule without state on a CPU,
            where there is nothing to spare.
        fused: Whether one Triton kernel moves all parameters at once; on a GPU, or a forecast of one.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        optimizer: str,
        eps: float,
        weight_decay: float = 0.0,
        at_once: bool | None = None,
        fused: bool = False,
    ) -> None:
        self._parameters: list[Tensor] = list(parameters)
        self._weight_decay = weight_decay
        self._rule = OPTIMIZERS.get(optimizer).elementwise()(eps=eps)
        is_worth_a_copy = bool(self._rule.state) or self._parameters[0].device.type != "cpu"
        self._at_once = is_worth_a_copy if at_once is None else at_once
        self._fused: Any = None
        if fused:  # needs Triton, which only a GPU brings along
            self._fused = import_module("slipstream.training.dense_kernels").FusedUpdate(self._parameters, self._rule)
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._kept = [self._parameters[0].new_zeros(sum(self._sizes)) for _ in self._rule.state]
        by_name = [self._split(kept) for kept in self._kept]
        self._by_parameter: list[list[Tensor]] = [[one[i] for one in by_name] for i in range(len(self._parameters))]
        self.state: list[Tensor] = [one for each in by_name for one in each]
        """What the rule keeps, of every parameter under its first name, then under the next; as views."""

    @torch.no_grad()
    def step(self, lr: Tensor, *, num_steps: Tensor | None = None, sample_weight: Tensor | None = None) -> None:
        """Apply the gradients.

        Args:
            lr: Learning rate, without dimensions, where the parameters live.
            num_steps: Steps taken, this one included, for rules that count them: shape (), float64.
            sample_weight: m, the weight of the samples behind the gradients, as in `RowOptimizer.direction`: shape ();
                None is 1.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if len(gradients) != len(self._parameters):
            raise ValueError("expected a gradient for every parameter; call backward first")
        if self._fused is not None and lr.device.type != "meta":  # a forecast launches nothing
            together = torch.cat([gradient.reshape(-1) for gradient in gradients])
            beside = {"num_steps": num_steps, "sample_weight": sample_weight, "weight_decay": self._weight_decay}
            self._fused(together, self._kept, lr=lr, **beside)
            return
        if self._weight_decay:
            torch._foreach_add_(gradients, self._parameters, alpha=self._weight_decay)
        if self._at_once:
            together = torch.cat([gradient.reshape(-1) for gradient in gradients])
            moved = self._rule.direction(together, self._kept, num_steps=num_steps, sample_weights=sample_weight)
            directions = self._split(moved)
        else:
            directions = [
                self._rule.direction(gradient, kept, num_steps=num_steps, sample_weights=sample_weight)
                for gradient, kept in zip(gradients, self._by_parameter, strict=True)
            ]
        torch._foreach_mul_(directions, lr)
        torch._foreach_add_(self._parameters, directions, alpha=-1)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def _split(self, flat: Tensor) -> list[Tensor]:
        """View one tensor of all elements as the parameters' shapes."""
        pieces = flat.split(self._sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._parameters, strict=True)]
