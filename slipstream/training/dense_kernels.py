"""The update of all dense layers as one Triton kernel: each value and its state are read and written once.

Plain PyTorch does the same in about ten kernels, each of which reads and writes all values. Parameters stay where they
are: every program has a block of one parameter, and finds by a table where that lies. Importing this module needs
Triton; see `slipstream.embedding.tiers.kernels`.

Shape suffixes: N values of all parameters, E blocks.
"""

# Triton reads the annotations of its arguments, so they must not become strings.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.embedding.rules import SGD, Adagrad, Adam, RowOptimizer

_RULES: dict[type[RowOptimizer], int] = {SGD: 0, Adagrad: 1, Adam: 2}
_BLOCK = 1024
_NUMBERS = {"enable_fp_fusion": False}
"""Products are rounded before they are added, as in plain PyTorch."""


class FusedUpdate:
    """Updates parameters by one launch.

    Args:
        parameters: What to update, contiguous, float32, all on one device; they must stay where they are.
        rule: SGD, Adagrad or Adam.
    """

    def __init__(self, parameters: Sequence[Tensor], rule: RowOptimizer) -> None:
        self._parameters, self._rule = list(parameters), rule
        self._addresses = [parameter.data_ptr() for parameter in parameters]
        blocks, first = [], 0
        for parameter, address in zip(parameters, self._addresses, strict=True):
            for start in range(0, parameter.numel(), _BLOCK):
                length = min(_BLOCK, parameter.numel() - start)
                blocks.append((address + start * parameter.element_size(), first + start, length))
            first += parameter.numel()
        # of each block: the address of its first value, the number of that among all values, how many it has
        self._blocks = torch.tensor(blocks, dtype=torch.int64, device=parameters[0].device).t().contiguous()

    def __call__(
        self,
        gradients: Tensor,
        state: Sequence[Tensor],
        *,
        lr: Tensor,
        num_steps: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """Move all parameters.

        Args:
            gradients: Of all parameters, one behind the other. Shape (N,).
            state: What the rule keeps, in its order, as gradients lie. Shapes (N,).
            lr: Learning rate, without dimensions, on the device.
            num_steps: As in `DenseOptimizer.step`.
            sample_weight: As there.
            weight_decay: L2 penalty, added to gradients.

        Raises:
            ValueError: A parameter lies elsewhere than it did.
        """
        if [parameter.data_ptr() for parameter in self._parameters] != self._addresses:
            raise ValueError("expected parameters where they were, found one that moved; make the optimizer anew")
        correction = gradients
        if isinstance(self._rule, Adam):
            assert num_steps is not None
            correction = self._rule.correction(num_steps).float()
        first, second = [*state, gradients, gradients][:2]
        _update[(self._blocks.shape[1],)](
            self._blocks,
            gradients,
            first,
            second,
            lr,
            gradients if sample_weight is None else sample_weight,
            correction,
            self._blocks.shape[1],
            weight_decay,
            self._rule.eps,
            1 - self._rule.betas[0],
            1 - self._rule.betas[1],
            RULE=_RULES[type(self._rule)],
            HAS_WEIGHT=sample_weight is not None,
            HAS_DECAY=weight_decay > 0,
            BLOCK=_BLOCK,
            **_NUMBERS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    blocks,
    gradients,
    first,
    second,
    lr,
    sample_weight,
    correction,
    num_blocks,
    weight_decay,
    eps,
    first_rate,
    second_rate,
    RULE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, lane = tl.program_id(0), tl.arange(0, BLOCK)
    cells = tl.load(blocks + block).to(tl.pointer_type(tl.float32)) + lane
    at = tl.load(blocks + num_blocks + block) + lane
    exists = lane < tl.load(blocks + 2 * num_blocks + block)
    values = tl.load(cells, mask=exists)
    steps = tl.load(gradients + at, mask=exists, other=0.0)
    if HAS_DECAY:
        steps = steps + values * weight_decay
    if RULE == 1:
        counted = steps
        if HAS_WEIGHT:
            counted = tl.div_rn(steps, tl.zeros_like(steps) + tl.sqrt_rn(tl.load(sample_weight)))
        sums = tl.load(first + at, mask=exists, other=1.0) + counted * counted
        tl.store(first + at, sums, mask=exists)
        steps = tl.div_rn(steps, tl.sqrt_rn(sums) + eps)
    if RULE == 2:
        squares = steps * steps
        if HAS_WEIGHT:
            squares = tl.div_rn(squares, tl.zeros_like(squares) + tl.load(sample_weight))
        mean = tl.load(first + at, mask=exists, other=0.0)
        mean = mean + first_rate * (steps - mean)
        mean_square = tl.load(second + at, mask=exists, other=1.0)
        mean_square = mean_square + second_rate * (squares - mean_square)
        tl.store(first + at, mean, mask=exists)
        tl.store(second + at, mean_square, mask=exists)
        steps = tl.div_rn(mean * tl.load(correction), tl.sqrt_rn(mean_square) + eps)
    tl.store(cells, values - steps * tl.load(lr), mask=exists)
