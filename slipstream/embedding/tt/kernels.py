"""Contract the cores of a tensor train for many rows at once, and the gradient of that.

Ids form a tree: level k holds the distinct prefixes (i_1 … i_k), so ids that begin alike share their first
products. A level then multiplies the partial products of its parents with one core slice per node, in one of
two ways: node by node (a batched product), or, on a CPU where the slice is larger than the partial product,
slice by slice over all nodes that use it, which reads every slice once instead of once a node.

**n** nodes of a level, **Q** columns formed so far, **r** rank to the left, **w** = q · rank to the right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARE_BELOW = 0.75  # share prefixes when that leaves fewer than this part of the nodes; gathering costs more else


class Level(NamedTuple):
    """How the nodes of one level are formed."""

    digit: Tensor
    """Core slice of each node. Shape (n,), int64."""
    source: Tensor | None
    """Node of the level above that each node extends, shape (n,), int64; None: each extends its namesake."""
    groups: tuple[Tensor, list[int]] | None
    """Where nodes are multiplied slice by slice: slices in order, and how many nodes in a row use each."""


class Plan(NamedTuple):
    """The tree of a set of ids."""

    levels: list[Level]
    position: Tensor | None
    """Where each id's row stands among the contracted rows, shape (U,), int64; None: in the ids' order."""


def plan_contraction(
    ids: Tensor, p_shapes: Sequence[int], q_shapes: Sequence[int], ranks: Sequence[int], *, by_slice: bool
) -> Plan:
    """Lay out the tree of a set of ids.

    Args:
        ids: Ascending, without duplicates, shape (U,), int64. Tables stand one after another: a row's id is
            row + table · prod(p).
        p_shapes: Row factors, d integers.
        q_shapes: Column factors, d integers.
        ranks: Ranks with the outer ones, d + 1 integers.
        by_slice: Whether levels with large slices are multiplied slice by slice.

    Returns:
        The plan for `contract` and `contract_backward`.
    """
    prefixes = [ids]
    parents: list[Tensor | None] = []
    for p in reversed(p_shapes[1:]):
        above = prefixes[0] // p
        shared, parent = torch.unique_consecutive(above, return_inverse=True)
        if shared.numel() > _SHARE_BELOW * above.numel():
            shared, parent = above, None
        prefixes.insert(0, shared)
        parents.insert(0, parent)

    levels = [Level(prefixes[0], None, None)]
    position: Tensor | None = None
    table_size, columns = p_shapes[0], q_shapes[0]
    for k, parent in enumerate(parents, start=1):
        table_size *= p_shapes[k]
        digit = prefixes[k] % p_shapes[k] + prefixes[k] // table_size * p_shapes[k]
        source = parent if position is None else position if parent is None else position[parent]
        groups = None
        order: Tensor | None = None
        if by_slice and q_shapes[k] * ranks[k + 1] > columns:
            digit, order = torch.sort(digit, stable=True)
            slices, counts = torch.unique_consecutive(digit, return_counts=True)
            groups = (slices, counts.tolist())
            source = order if source is None else source[order]
        elif source is not None and position is not None:
            source, order = torch.sort(source, stable=True)
            digit = digit[order]
            source = None if parent is None else source
        levels.append(Level(digit, source, groups))
        position = None if order is None else _invert(order)
        columns *= q_shapes[k]
    return Plan(levels, position)


def _invert(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def contract(plan: Plan, cores: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Multiply out the rows of a plan.

    Args:
        plan: From `plan_contraction`.
        cores: Core k as (tables · p_k, r_{k-1}, q_k, r_k).

    Returns:
        Rows, shape (U, D), in the order of `plan.position`; and the left factor of every level but the first.
    """
    partial = cores[0].index_select(0, plan.levels[0].digit).squeeze(1)
    lefts = []
    for level, core in zip(plan.levels[1:], cores[1:], strict=True):
        left = partial if level.source is None else partial.index_select(0, level.source)
        slices = core.flatten(2)
        if level.groups is None:
            product = torch.bmm(left, slices.index_select(0, level.digit))
        else:
            product = _multiply_by_slice(left, slices, *level.groups)
        partial = product.view(left.shape[0], left.shape[1] * core.shape[2], core.shape[3])
        lefts.append(left)
    return partial.squeeze(-1), lefts


def _multiply_by_slice(left: Tensor, slices: Tensor, used: Tensor, counts: list[int]) -> Tensor:
    sizes = [count * left.shape[1] for count in counts]
    product = left.new_empty((left.shape[0] * left.shape[1], slices.shape[2]))
    of_slice = slices.unbind(0)
    for index, x, out in zip(used.tolist(), left.flatten(0, 1).split(sizes), product.split(sizes), strict=True):
        torch.mm(x, of_slice[index], out=out)
    return product


def contract_backward(
    plan: Plan, cores: Sequence[Tensor], lefts: Sequence[Tensor], grad_rows: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Give the gradient of `contract` on the core slices it used.

    Args:
        plan: As given to `contract`.
        cores: As given to `contract`.
        lefts: As `contract` returned them.
        grad_rows: Gradient of the rows, shape (U, D), in the order of `plan.position`.

    Returns:
        Per core: the slices used, ascending, without duplicates, shape (m,), int64; and their gradient, shape
        (m, r_{k-1}, q_k, r_k). The order of summation is fixed, so that equal inputs give equal bits.
    """
    grads: list[tuple[Tensor, Tensor]] = []
    grad = grad_rows
    for level, core, left in zip(plan.levels[:0:-1], cores[:0:-1], reversed(lefts), strict=True):
        slices = core.flatten(2)
        grad = grad.reshape(left.shape[0], left.shape[1], slices.shape[2])
        if level.groups is None:
            # B^T A, the transposed gradient, and a contiguous G^T: both faster in MKL than A^T B and a view
            used, summed = segment_sum(torch.bmm(grad.transpose(1, 2), left).flatten(1), level.digit)
            transposed = _transposed(slices, level.digit)
            grad = torch.bmm(grad, transposed)
        else:
            used = level.groups[0]
            grad, summed = _backward_by_slice(grad, left, slices, *level.groups)
        summed = summed.view(-1, slices.shape[2], slices.shape[1]).transpose(1, 2)
        grads.append((used, summed.unflatten(2, core.shape[2:])))
        if level.source is not None:
            grad = segment_sum(grad.flatten(1), level.source)[1]
    used, summed = segment_sum(grad.flatten(1), plan.levels[0].digit)
    grads.append((used, summed.view(-1, *cores[0].shape[1:])))
    return grads[::-1]


def _transposed(slices: Tensor, index: Tensor) -> Tensor:
    if slices.shape[0] <= index.numel():
        return slices.transpose(1, 2).contiguous().index_select(0, index)
    return slices.index_select(0, index).transpose(1, 2).contiguous()


def _backward_by_slice(
    grad: Tensor, left: Tensor, slices: Tensor, used: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    sizes = [count * left.shape[1] for count in counts]
    transposed = _transposed(slices, used)
    grad_left = torch.empty_like(left)
    summed = torch.empty_like(transposed)
    groups = zip(
        left.flatten(0, 1).split(sizes),
        grad.flatten(0, 1).split(sizes),
        grad.flatten(0, 1).t().split(sizes, 1),
        grad_left.view(-1, left.shape[2]).split(sizes),
        transposed.unbind(0),
        summed.unbind(0),
        strict=True,
    )
    for x, y, y_t, grad_x, slice_t, grad_slice_t in groups:
        torch.mm(y_t, x, out=grad_slice_t)
        torch.mm(y, slice_t, out=grad_x)
    return grad_left, summed


def segment_sum(values: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows that share a key, always in the same order.

    Args:
        values: Shape (n, w), floating point.
        key: Shape (n,), int64.

    Returns:
        Distinct keys, ascending, shape (m,), and the sums, shape (m, w).
    """
    if key.numel() == 0:
        return key, values
    ascending, order = torch.sort(key, stable=True)
    distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
    if distinct.numel() == key.numel():
        return distinct, values.index_select(0, order)
    return distinct, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")
