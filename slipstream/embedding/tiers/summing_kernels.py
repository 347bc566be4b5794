"""Triton kernels over sorted lookups: rows to lookups, and gradients of lookups to rows; `TritonPlan` launches them.

Sorted lookups are cut into tiles. A row with at most a tile of lookups is summed by one program. A longer run is
summed tile by tile first: at most two such runs meet in a tile, one that ends there and one that begins, so a tile has
room for two partial sums.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def spread(  # type: ignore[no-untyped-def]
    buffer, order, inverse, positions, sizes, looked_up, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Copy the row of every lookup to its place."""
    # In sorted order the lookups of one row follow each other, so that it is read from the buffer once.
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    exists = at < tl.load(sizes + 2)
    lookups = tl.load(order + at, mask=exists, other=0)
    ranks = tl.load(inverse + lookups, mask=exists, other=0)
    sources = tl.load(positions + ranks, mask=exists, other=0)
    inside = exists[:, None] & (columns < dim)[None, :]
    rows = tl.load(buffer + sources[:, None] * dim + columns[None, :], mask=inside)
    tl.store(looked_up + lookups[:, None] * dim + columns[None, :], rows, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def sum_tiles(  # type: ignore[no-untyped-def]
    per_lookup, partial, order, inverse, starts, sizes, dim, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Sum the parts of long runs that lie in each tile."""
    # Of the runs longer than a tile, the one that reaches in from the left, or begins the tile, and the one that
    # begins later and reaches out to the right. A run begins and ends where `starts` says.
    tile = tl.program_id(0)
    num_lookups = tl.load(sizes + 2)
    first = tl.program_id(0).to(tl.int64) * TILE
    last = tl.minimum(first + TILE, num_lookups)
    if first < last:
        left = tl.load(inverse + tl.load(order + first))
        right = tl.load(inverse + tl.load(order + last - 1))
        left_end = tl.load(starts + left + 1)
        left_is_long = left_end - tl.load(starts + left) > TILE
        right_start = tl.load(starts + right)
        right_is_long = (tl.load(starts + right + 1) - right_start > TILE) & (right != left)
        if left_is_long | right_is_long:
            at = first + tl.arange(0, TILE)
            columns = tl.arange(0, WIDTH)
            of_left = at < tl.where(left_is_long, tl.minimum(left_end, last), 0)
            of_right = (at >= tl.where(right_is_long, right_start, last)) & (at < last)
            belongs = of_left | of_right
            lookups = tl.load(order + at, mask=belongs, other=0)
            inside = belongs[:, None] & (columns < dim)[None, :]
            values = tl.load(per_lookup + lookups[:, None] * dim + columns[None, :], mask=inside, other=0.0)
            place = partial + tile.to(tl.int64) * 2 * dim + columns
            if left_is_long:
                tl.store(place, tl.sum(tl.where(of_left[:, None], values, 0.0), axis=0), mask=columns < dim)
            if right_is_long:
                tl.store(place + dim, tl.sum(tl.where(of_right[:, None], values, 0.0), axis=0), mask=columns < dim)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_run(  # type: ignore[no-untyped-def]
    per_lookup, partial, order, first, last, dim, TILE: tl.constexpr, FEW: tl.constexpr, WIDTH: tl.constexpr
):
    # A short run is a sum of lookups, a long one of partial sums: the first stands to the right in its tile, unless
    # the run begins with the tile, and all others to the left.
    columns = tl.arange(0, WIDTH)
    few = tl.arange(0, FEW)
    sums = tl.zeros((FEW, WIDTH), tl.float32)
    if last - first <= TILE:
        for start in range(first, last, FEW):
            at = start + few
            lookups = tl.load(order + at, mask=at < last, other=0)
            inside = (at < last)[:, None] & (columns < dim)[None, :]
            sums += tl.load(per_lookup + lookups[:, None] * dim + columns[None, :], mask=inside, other=0.0)
    else:
        first_tile = first // TILE
        end_tile = (last + TILE - 1) // TILE
        for start in range(first_tile, end_tile, FEW):
            tiles = start + few
            stands_right = (tiles == first_tile) & (first % TILE != 0)
            places = 2 * tiles + stands_right.to(tl.int64)
            inside = (tiles < end_tile)[:, None] & (columns < dim)[None, :]
            sums += tl.load(partial + places[:, None] * dim + columns[None, :], mask=inside, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def sum_runs(  # type: ignore[no-untyped-def]
    per_lookup,
    partial,
    order,
    starts,
    sizes,
    summed,
    dim,
    TILE: tl.constexpr,
    FEW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum what belongs to the lookups of each distinct row."""
    columns = tl.arange(0, WIDTH)
    for rank in range(tl.program_id(0), tl.load(sizes), tl.num_programs(0)):
        first, last = tl.load(starts + rank), tl.load(starts + rank + 1)
        sums = _sum_run(per_lookup, partial, order, first, last, dim, TILE, FEW, WIDTH)
        tl.store(summed + rank * dim + columns, sums, mask=columns < dim)


@triton.jit  # type: ignore[untyped-decorator]
def sum_and_update(  # type: ignore[no-untyped-def]
    gradients,
    partial,
    order,
    starts,
    sizes,
    distinct,
    positions,
    buffer,
    host,
    state,
    host_state,
    second_state,
    host_second_state,
    sample_weights,
    lr,
    correction,
    num_hot,
    dim,
    eps,
    first_share,
    second_share,
    RULE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TILE: tl.constexpr,
    FEW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum the gradients of each distinct row, and change the row and its state on the device and on the host."""
    columns = tl.arange(0, WIDTH)
    inside = columns < dim
    for rank in range(tl.program_id(0), tl.load(sizes), tl.num_programs(0)):
        first, last = tl.load(starts + rank), tl.load(starts + rank + 1)
        step = _sum_run(gradients, partial, order, first, last, dim, TILE, FEW, WIDTH)
        slot = tl.load(distinct + rank).to(tl.int64)
        on_host = inside & (slot + tl.zeros_like(columns) >= num_hot)
        here = tl.load(positions + rank) * dim + columns
        there = (slot - num_hot) * dim + columns
        weight = 1.0
        if HAS_WEIGHTS:
            weight = tl.load(sample_weights + rank)
        if RULE == 1:  # one sum of squares for the row
            squares = tl.sum(step * step, axis=0) / dim
            if HAS_WEIGHTS:
                squares = squares / weight
            sums = tl.load(state + tl.load(positions + rank)) + squares
            tl.store(state + tl.load(positions + rank), sums)
            if slot >= num_hot:
                tl.store(host_state + (slot - num_hot), sums)
            step = step / (tl.sqrt(sums) + eps)
        if RULE == 2:  # one for each element
            counted = step
            if HAS_WEIGHTS:
                counted = step / tl.sqrt(weight)
            sums = tl.load(state + here, mask=inside, other=1.0) + counted * counted
            tl.store(state + here, sums, mask=inside)
            tl.store(host_state + there, sums, mask=on_host)
            step = step / (tl.sqrt(sums) + eps)
        if RULE == 3:  # two moments for each element
            mean = tl.load(state + here, mask=inside, other=0.0)
            mean += first_share * (step - mean)
            squares = step * step
            if HAS_WEIGHTS:
                squares = squares / weight
            spread = tl.load(second_state + here, mask=inside, other=1.0)
            spread += second_share * (squares - spread)
            tl.store(state + here, mean, mask=inside)
            tl.store(host_state + there, mean, mask=on_host)
            tl.store(second_state + here, spread, mask=inside)
            tl.store(host_second_state + there, spread, mask=on_host)
            step = mean * tl.load(correction) / (tl.sqrt(spread) + eps)
        values = tl.load(buffer + here, mask=inside) - step * tl.load(lr)
        tl.store(buffer + here, values, mask=inside)
        tl.store(host + there, values, mask=on_host)
