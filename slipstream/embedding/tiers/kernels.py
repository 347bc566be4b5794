"""Lookup and update of rows as one Triton kernel each.

Plain PyTorch does the same in two gathers and in about eight small kernels (`TrainStep` and `update_rows`); here every
row is read once and written once. The choice between the two is `train.kernels`. Importing this module needs Triton,
which comes with PyTorch for CUDA; with TRITON_INTERPRET=1 set before the import the kernels also run on a CPU, slowly,
which is how the tests compare them.

Shape suffixes: P positions of the buffer, L lookups, U unique positions, D embedding_dim.
"""

# Triton reads the annotations of its arguments, so they must not become strings.

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from slipstream.embedding.rules import RowOptimizer

_VALUES_PER_PROGRAM = 2048
_NUMBERS = {"enable_fp_fusion": False}
"""Products are rounded before they are added, as in plain PyTorch; left open, Triton asks for a choice at every run."""


def gather_rows(buffer: Tensor, unique: Tensor, inverse: Tensor) -> Tensor:
    """Rows of all lookups.

    Args:
        buffer: Shape (P, D), float32.
        unique: Distinct positions. Shape (U,), int64.
        inverse: Index into `unique` of each lookup. Shape (L,), int32 or int64.

    Returns:
        Shape (L, D), float32.
    """
    looked_up = buffer.new_empty(len(inverse), buffer.shape[1])
    block, width = _block(buffer.shape[1])
    if len(inverse):
        _gather[(triton.cdiv(len(inverse), block),)](
            buffer, unique, inverse, looked_up, len(inverse), buffer.shape[1], BLOCK=block, WIDTH=width, **_NUMBERS
        )
    return looked_up


def update_rows(
    rule: RowOptimizer,
    weights: Tensor,
    state: Sequence[Tensor],
    positions: Tensor,
    gradients: Tensor,
    *,
    lr: Tensor,
    sample_weights: Tensor | None = None,
    first_spare: int | None = None,
) -> None:
    """Apply one sparse step in place: what `slipstream.embedding.tiers.rows.update_rows` does.

    Args:
        rule: SGD or row-wise Adagrad.
        weights: Shape (P, D), float32.
        state: The accumulators of row-wise Adagrad, of shape (P,), float32; nothing for SGD.
        positions: Rows to change. Shape (U,), int64.
        gradients: Summed over duplicates. Shape (U, D), float32.
        lr: Learning rate, without dimensions, on the same device.
        sample_weights: The weight of the samples behind each gradient; None is 1. Shape (U,), float32.
        first_spare: Positions from this one on are padding: nothing is read or written for them. None has no padding.

    Raises:
        ValueError: The rule has no kernel.
    """
    if not rule.has_kernel:
        raise ValueError(
            f"expected SGD or row-wise Adagrad, found {type(rule).__name__}, which has no Triton kernel: "
            'use kernels = "torch"'
        )
    block, width = _block(weights.shape[1])
    if len(positions):
        _update[(triton.cdiv(len(positions), block),)](
            weights,
            state[0] if state else weights,
            positions,
            gradients,
            gradients if sample_weights is None else sample_weights,
            lr,
            len(positions),
            weights.shape[1],
            len(weights) if first_spare is None else first_spare,
            rule.eps,
            HAS_STATE=len(state) == 1,
            HAS_WEIGHTS=sample_weights is not None,
            BLOCK=block,
            WIDTH=width,
            **_NUMBERS,
        )


def _block(dim: int) -> tuple[int, int]:
    """(rows per program, columns rounded up to a power of two)."""
    width = triton.next_power_of_2(dim)
    return max(1, _VALUES_PER_PROGRAM // width), width


@triton.jit  # type: ignore[untyped-decorator]
def _gather(buffer, unique, inverse, looked_up, num_lookups, dim, BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    lookups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    exists = lookups < num_lookups
    ranks = tl.load(inverse + lookups, mask=exists, other=0)
    positions = tl.load(unique + ranks, mask=exists, other=0)
    inside = exists[:, None] & (columns < dim)[None, :]
    rows = tl.load(buffer + positions[:, None] * dim + columns[None, :], mask=inside)
    tl.store(looked_up + lookups[:, None] * dim + columns[None, :], rows, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _update(  # type: ignore[no-untyped-def]
    weights,
    state,
    positions,
    gradients,
    sample_weights,
    lr,
    num_rows,
    dim,
    first_spare,
    eps,
    HAS_STATE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    ranks = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    exists = ranks < num_rows
    at = tl.load(positions + ranks, mask=exists, other=0)
    exists = exists & (at < first_spare)
    inside = exists[:, None] & (columns < dim)[None, :]
    steps = tl.load(gradients + ranks[:, None] * dim + columns[None, :], mask=inside, other=0.0)
    if HAS_STATE:
        squares = tl.sum(steps * steps, axis=1) / dim
        if HAS_WEIGHTS:
            squares = squares / tl.load(sample_weights + ranks, mask=exists, other=1.0)
        sums = tl.load(state + at, mask=exists, other=1.0) + squares
        tl.store(state + at, sums, mask=exists)
        steps = steps / (tl.sqrt(sums) + eps)[:, None]
    cells = weights + at[:, None] * dim + columns[None, :]
    values = tl.load(cells, mask=inside)
    tl.store(cells, values - tl.load(lr) * steps, mask=inside)
