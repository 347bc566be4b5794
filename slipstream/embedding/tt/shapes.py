"""Tensor-train arithmetic: factor a table's two sizes, draw cores, cut a dense table into cores and back.

A table of N rows and D columns is seen as a tensor of shape (p_1 … p_d, q_1 … q_d) with prod(p) >= N and
prod(q) == D. Core k has shape (p_k, r_{k-1}, q_k, r_k), r_0 = r_d = 1, and

    table[i, j] = G_1[i_1, :, j_1, :] @ G_2[i_2, :, j_2, :] @ … @ G_d[i_d, :, j_d, :]

where i_1 … i_d and j_1 … j_d are the digits of i and j, most significant first.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

WeightDist = Literal["uniform", "normal", "approx-uniform", "approx-normal"]
WEIGHT_DISTS = ("uniform", "normal", "approx-uniform", "approx-normal")

_TAIL = 2.0  # "approx-normal" keeps only draws this many deviations out
_BACKGROUND = 0.05  # "approx-uniform": deviation of the entries a core does not select


def suggested_tt_shapes(size: int, num_cores: int = 3, *, allow_round_up: bool = True) -> list[int]:
    """Factor a size into a few balanced factors.

    Sizes tried are `size` rounded up to each power of ten while that adds at most a quarter (as
    FBTT-Embedding does, so the usual tables get its shapes); should none of them give factors within a
    factor of two of each other, every size of a window above is tried too. The most balanced factors win
    (largest entropy of their shares), then the smallest product.

    Args:
        size: What the product must reach, >= 1.
        num_cores: How many factors, 1 to 4.
        allow_round_up: False for a product that equals `size` exactly (an embedding dimension).

    Returns:
        `num_cores` integers >= 1: ascending, for four the lower pair interleaved with the upper.

    Raises:
        ValueError: A size is out of range.

    Example:
        >>> suggested_tt_shapes(10_131_227), suggested_tt_shapes(96, allow_round_up=False)
        ([200, 220, 250], [4, 4, 6])

    Source: FBTT-Embedding, `suggested_tt_shapes`; differs in that waste is bounded and 96 and 128 work.
    """
    if size < 1 or not 1 <= num_cores <= 4:
        raise ValueError(
            f"expected size >= 1 and 1 to 4 factors, found size {size} and {num_cores} factors: "
            "pass a positive size and as many factors as there are cores"
        )
    if not allow_round_up:
        return _interleave(_most_balanced(size, num_cores))
    limit = size + size // 4
    rounded = {-(-size // 10**power) * 10**power for power in range(len(str(size)))}
    best = _best_candidate([candidate for candidate in rounded if candidate <= limit], num_cores)
    if best[-1] > 2 * best[0]:
        window = range(size, min(limit, size + 1000) + 1)
        best = _best_candidate([math.prod(best), *window], num_cores)
    return _interleave(best)


def _best_candidate(candidates: Sequence[int], num_factors: int) -> tuple[int, ...]:
    choices = [_most_balanced(candidate, num_factors) for candidate in candidates]
    return max(choices, key=lambda factors: (_entropy(factors), -math.prod(factors)))


def _most_balanced(size: int, num_factors: int) -> tuple[int, ...]:
    return max(_factorisations(size, num_factors), key=_entropy)


def _factorisations(size: int, num_factors: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ascending tuples of factors >= least with product `size`."""
    if num_factors == 1:
        yield (size,)
        return
    for factor in range(least, math.floor(size ** (1 / num_factors) + 1e-9) + 1):
        if size % factor == 0:
            for rest in _factorisations(size // factor, num_factors - 1, factor):
                yield (factor, *rest)


def _entropy(factors: Sequence[int]) -> float:
    total = sum(factors)
    # rounded, so that 100·100·100 and 200·200·200 tie and the smaller product wins
    return round(-sum(factor / total * math.log(factor / total) for factor in factors), 12)


def _interleave(factors: Sequence[int]) -> list[int]:
    half = len(factors) // 2
    low, high = list(factors[:half]), list(factors[half:])
    return [value for pair in zip(low, high, strict=False) for value in pair] + high[half:]


def check_tt_shapes(
    num_embeddings: int,
    embedding_dim: int,
    tt_ranks: Sequence[int],
    tt_p_shapes: Sequence[int] | None,
    tt_q_shapes: Sequence[int] | None,
) -> tuple[list[int], list[int], list[int]]:
    """Check the shapes of a tensor train and fill in those left out.

    Args:
        num_embeddings: Rows of the table, >= 1.
        embedding_dim: Columns of the table, >= 1.
        tt_ranks: Inner ranks, one fewer than cores: 1 to 3 integers >= 1.
        tt_p_shapes: Row factors, product >= num_embeddings; None for `suggested_tt_shapes`.
        tt_q_shapes: Column factors, product == embedding_dim; None for `suggested_tt_shapes`.

    Returns:
        Row factors, column factors, and the ranks with the outer ones: lists of d, d and d + 1 integers.

    Raises:
        ValueError: A size is below 1, a count does not match, or a product is wrong.
    """
    if num_embeddings < 1 or embedding_dim < 1:
        raise ValueError(
            f"expected num_embeddings and embedding_dim >= 1, found {num_embeddings} and {embedding_dim}: "
            "a table has at least one row and one column"
        )
    if not 1 <= len(tt_ranks) <= 3 or min(tt_ranks) < 1:
        raise ValueError(
            f"expected 1 to 3 tt_ranks >= 1 (2 to 4 cores), found {list(tt_ranks)}: give one rank per "
            "pair of neighbouring cores"
        )
    num_cores = len(tt_ranks) + 1
    p_shapes = list(tt_p_shapes) if tt_p_shapes else suggested_tt_shapes(num_embeddings, num_cores)
    q_shapes = list(tt_q_shapes) if tt_q_shapes else suggested_tt_shapes(embedding_dim, num_cores, allow_round_up=False)
    for name, shapes in (("tt_p_shapes", p_shapes), ("tt_q_shapes", q_shapes)):
        if len(shapes) != num_cores or min(shapes) < 1:
            raise ValueError(
                f"expected {num_cores} factors >= 1 in {name} for {len(tt_ranks)} tt_ranks, found {shapes}: "
                "give one factor per core, or leave them out"
            )
    if math.prod(p_shapes) < num_embeddings:
        raise ValueError(
            f"expected tt_p_shapes with a product >= num_embeddings = {num_embeddings}, found {p_shapes} "
            f"with product {math.prod(p_shapes)}: enlarge a factor, or leave tt_p_shapes out"
        )
    if math.prod(q_shapes) != embedding_dim:
        raise ValueError(
            f"expected tt_q_shapes with product embedding_dim = {embedding_dim}, found {q_shapes} with "
            f"product {math.prod(q_shapes)}: change a factor, or leave tt_q_shapes out"
        )
    return p_shapes, q_shapes, [1, *tt_ranks, 1]


def entry_variance(weight_dist: WeightDist, num_embeddings: int, embedding_dim: int) -> float:
    """Give the variance that entries of a freshly drawn table have.

    Args:
        weight_dist: Name of the initialisation.
        num_embeddings: Rows of the table.
        embedding_dim: Columns of the table.

    Returns:
        1 / (3N) for the approx-* ones, the variance of DLRM's U(-1/sqrt(N), 1/sqrt(N)); 2 / (N + D),
        Glorot's, for "uniform"; 1 / N for "normal".

    Raises:
        ValueError: The name is unknown.
    """
    if weight_dist not in WEIGHT_DISTS:
        raise ValueError(f"expected weight_dist in {WEIGHT_DISTS}, found {weight_dist!r}: pass one of these")
    if weight_dist == "uniform":
        return 2 / (num_embeddings + embedding_dim)
    return 1 / num_embeddings if weight_dist == "normal" else 1 / (3 * num_embeddings)


def draw_cores(
    weight_dist: WeightDist,
    shapes: Sequence[tuple[int, ...]],
    variance: float,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw cores whose product has entries of mean 0 and a given variance.

    Cores are drawn in standard form and then scaled alike, so that the mean square of the product's entries
    is `variance` in this very draw, not only on average over draws. "approx-normal" draws from the tails of a
    normal beyond two deviations: products of factors that are never small are not peaked at 0, so the entries
    of the table look normal already at small ranks. In "approx-uniform" every core but the last selects one
    path by a random sign over a faint background and the last holds U(-1, 1), so the entries look uniform.

    Args:
        weight_dist: Name of the initialisation.
        shapes: Shape of each core: (tables, p_k, r_{k-1}, q_k, r_k).
        variance: What the entries of the product get, > 0.
        generator: Source of randomness on the CPU; None for torch's own.

    Returns:
        One float64 CPU tensor per shape.

    Source: TT-Rec, "sampled Gaussian" initialisation; the scale, for any number of cores, is ours.
    """
    if weight_dist == "approx-uniform":
        cores = [_signed_selector(shape, generator) for shape in shapes[:-1]]
        cores.append(torch.rand(shapes[-1], dtype=torch.float64, generator=generator).mul_(2).sub_(1))
    else:
        cores = [_standard_draw(weight_dist, shape, generator) for shape in shapes]
    scale = (variance / _mean_square(cores)) ** (1 / (2 * len(cores)))
    return [core * scale[:, None, None, None, None] for core in cores]


def _mean_square(cores: Sequence[Tensor]) -> Tensor:
    """Mean square of all entries of each table, without forming it. Shape (T,)."""
    gram = cores[0].new_ones((cores[0].shape[0], 1, 1))
    for core in cores:
        left = torch.einsum("tru,tpuqv->tprqv", gram, core)
        gram = torch.einsum("tprqs,tprqv->tsv", core, left) / (core.shape[1] * core.shape[3])
    return gram[:, 0, 0]


def _standard_draw(weight_dist: WeightDist, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    if weight_dist == "normal":
        return torch.randn(shape, dtype=torch.float64, generator=generator)
    draw = torch.rand(shape, dtype=torch.float64, generator=generator).mul_(2).sub_(1)
    if weight_dist == "uniform":
        return draw.mul_(math.sqrt(3))
    tail_mass = math.erfc(_TAIL / math.sqrt(2)) / 2
    density = math.exp(-(_TAIL**2) / 2) / math.sqrt(2 * math.pi)
    tail_deviation = math.sqrt(1 + _TAIL * density / tail_mass)
    magnitude = -torch.special.ndtri(draw.abs().clamp_(min=1e-12).mul_(tail_mass))
    signed: Tensor = magnitude.copysign_(draw).div_(tail_deviation)
    return signed


def _signed_selector(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    core = torch.randn(shape, dtype=torch.float64, generator=generator).mul_(_BACKGROUND)
    chosen = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    sign = torch.randint(2, chosen.shape, generator=generator).mul_(2).sub_(1).double()
    return core.scatter_add_(-1, chosen, sign)


def tt_to_dense(cores: Sequence[Tensor]) -> Tensor:
    """Multiply cores out into the whole table.

    Args:
        cores: Core k of shape (p_k, r_{k-1}, q_k, r_k), r_0 = r_d = 1.

    Returns:
        The table, shape (prod(p), prod(q)), differentiable.
    """
    table = cores[0].squeeze(1)
    for core in cores[1:]:
        product = torch.einsum("iar,jrbs->ijabs", table, core)
        table = product.reshape(table.shape[0] * core.shape[0], -1, core.shape[-1])
    return table.squeeze(-1)


def tt_svd(weight: Tensor, p_shapes: Sequence[int], q_shapes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Cut a dense table into tensor-train cores.

    Exact up to rounding where the ranks reach those of the table, within a factor sqrt(d - 1) of the best
    approximation of these ranks otherwise. A rank above what a core can have is filled with zeros.

    Args:
        weight: The table, shape (N, D), N <= prod(p_shapes), D == prod(q_shapes). Missing rows count as 0.
        p_shapes: Row factors, d integers.
        q_shapes: Column factors, d integers.
        ranks: Ranks with the outer ones, d + 1 integers.

    Returns:
        Core k of shape (p_k, r_{k-1}, q_k, r_k), in the dtype of `weight`.

    Raises:
        ValueError: A weight is NaN or infinite.

    Source: Oseledets, "Tensor-Train Decomposition" (2011), algorithm 1.
    """
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"expected finite weights, found {int((~finite).sum())} that are NaN or infinite, the first in "
            f"row {row}: clean the table before compressing it"
        )
    num_cores = len(p_shapes)
    padded = weight.new_zeros((math.prod(p_shapes), weight.shape[1]), dtype=torch.float64)
    padded[: weight.shape[0]] = weight.detach()
    order = [axis for k in range(num_cores) for axis in (k, num_cores + k)]
    rest = padded.reshape(*p_shapes, *q_shapes).permute(order)
    cores = []
    for p, q, left_rank, right_rank in zip(p_shapes[:-1], q_shapes[:-1], ranks[:-2], ranks[1:-1], strict=True):
        left, scale, right = torch.linalg.svd(rest.reshape(left_rank * p * q, -1), full_matrices=False)
        kept = min(right_rank, scale.numel())
        core = left.new_zeros((left.shape[0], right_rank))
        core[:, :kept] = left[:, :kept]
        rest = right.new_zeros((right_rank, right.shape[1]))
        rest[:kept] = scale[:kept, None] * right[:kept]
        cores.append(core.reshape(left_rank, p, q, right_rank))
    cores.append(rest.reshape(ranks[-2], p_shapes[-1], q_shapes[-1], 1))
    return [core.transpose(0, 1).to(weight.dtype).contiguous() for core in cores]
