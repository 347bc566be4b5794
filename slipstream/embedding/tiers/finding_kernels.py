"""Triton kernels that find the distinct rows of a batch and bring cold ones over; `TritonPlan` launches them."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def note_runs(  # type: ignore[no-untyped-def]
    by_slot, order, ranks, inverse, distinct, starts, sizes, num_lookups, num_rows, num_hot, BLOCK: tl.constexpr
):
    """Note where runs of equal slots begin: distinct slots, their first lookups, ranks of lookups, sizes."""
    # One entry behind the last lookup ends the last run. `ranks` counts changes of slot: entry i - 1 is the rank of i.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at <= num_lookups
    slots = tl.load(by_slot + at, mask=at < num_lookups, other=num_rows)
    before = tl.load(by_slot + at - 1, mask=exists & (at > 0), other=-1)
    rank = tl.load(ranks + at - 1, mask=(at > 0) & (at < num_lookups), other=0)
    behind_all = at == num_lookups
    rank = tl.where(behind_all, tl.load(ranks + at - 2, mask=behind_all & (at > 1), other=0) + 1, rank)
    is_lookup = exists & (slots < num_rows)
    lookups = tl.load(order + at, mask=is_lookup, other=0)
    tl.store(inverse + lookups, rank, mask=is_lookup)
    is_first = is_lookup & (slots != before)
    tl.store(distinct + rank, slots, mask=is_first)
    ends = exists & (slots >= num_rows) & (before < num_rows)
    tl.store(starts + rank, at.to(tl.int64), mask=is_first | ends)
    tl.store(sizes + tl.zeros_like(at), rank.to(tl.int64), mask=ends)
    tl.store(sizes + tl.zeros_like(at) + 2, at.to(tl.int64), mask=ends)
    turns_cold = exists & (slots >= num_hot) & (before < num_hot)
    tl.store(sizes + tl.zeros_like(at) + 1, rank.to(tl.int64), mask=turns_cold)
    tl.store(sizes + tl.zeros_like(at) + 3, at.to(tl.int64), mask=turns_cold)


@triton.jit  # type: ignore[untyped-decorator]
def place(  # type: ignore[no-untyped-def]
    distinct,
    sizes,
    distinct_before,
    sizes_before,
    positions,
    earlier,
    num_hot,
    first_place,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Say where each distinct row is to be, and where a cold one stands among those of the batch before."""
    num_distinct, first_cold = tl.load(sizes), tl.load(sizes + 1)
    num_before, first_cold_before = tl.load(sizes_before), tl.load(sizes_before + 1)
    for start in range(tl.program_id(0) * BLOCK, num_distinct, tl.num_programs(0) * BLOCK):
        rank = start + tl.arange(0, BLOCK)
        exists = rank < num_distinct
        slots = tl.load(distinct + rank, mask=exists, other=0)
        is_cold = exists & (slots >= num_hot)
        tl.store(positions + rank, tl.where(is_cold, first_place + rank - first_cold, slots.to(tl.int64)), mask=exists)
        # a binary search among the cold rows of the batch before: the first that is not smaller
        low = tl.zeros_like(slots).to(tl.int64) + first_cold_before
        high = tl.zeros_like(low) + num_before
        for _ in range(STEPS):
            middle = (low + high) // 2
            searches = is_cold & (low < high)
            is_smaller = tl.load(distinct_before + middle, mask=searches, other=0) < slots
            low = tl.where(searches & is_smaller, middle + 1, low)
            high = tl.where(searches & (is_smaller == 0), middle, high)
        reaches = is_cold & (low < num_before)
        is_shared = reaches & (tl.load(distinct_before + low, mask=reaches, other=-1) == slots)
        tl.store(earlier + rank, tl.where(is_shared, low, -1), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def fetch(  # type: ignore[no-untyped-def]
    host,
    buffer,
    distinct,
    positions,
    earlier,
    sizes,
    totals,
    fetched_by,
    num_hot,
    dim,
    COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy cold rows from the host into the buffer, those that are not at work in the batch before."""
    program = tl.program_id(0)
    num_distinct, first_cold = tl.load(sizes), tl.load(sizes + 1)
    columns = tl.arange(0, WIDTH)
    num_fetched = tl.zeros((), tl.int64)
    for start in range(first_cold + program * ROWS, num_distinct, tl.num_programs(0) * ROWS):
        rank = start + tl.arange(0, ROWS)
        exists = rank < num_distinct
        is_needed = exists & (tl.load(earlier + rank, mask=exists, other=0) < 0)
        sources = tl.load(distinct + rank, mask=is_needed, other=0).to(tl.int64) - num_hot
        targets = tl.load(positions + rank, mask=is_needed, other=0)
        inside = is_needed[:, None] & (columns < dim)[None, :]
        values = tl.load(host + sources[:, None] * dim + columns[None, :], mask=inside)
        tl.store(buffer + targets[:, None] * dim + columns[None, :], values, mask=inside)
        num_fetched += tl.sum(is_needed.to(tl.int64), axis=0)
    if COUNTS:
        tl.store(fetched_by + program, tl.load(fetched_by + program) + num_fetched)
        if program == 0:
            num_lookups = tl.load(sizes + 2)
            tl.store(totals, tl.load(totals) + num_lookups)
            tl.store(totals + 1, tl.load(totals + 1) + num_lookups - tl.load(sizes + 3))
            tl.store(totals + 3, tl.load(totals + 3) + num_distinct - first_cold)


@triton.jit  # type: ignore[untyped-decorator]
def take_over(  # type: ignore[no-untyped-def]
    buffer, positions, earlier, sizes, positions_before, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Copy rows within the buffer that the batch before has too."""
    num_distinct, first_cold = tl.load(sizes), tl.load(sizes + 1)
    columns = tl.arange(0, WIDTH)
    for start in range(first_cold + tl.program_id(0) * ROWS, num_distinct, tl.num_programs(0) * ROWS):
        rank = start + tl.arange(0, ROWS)
        exists = rank < num_distinct
        at = tl.load(earlier + rank, mask=exists, other=-1)
        is_shared = exists & (at >= 0)
        sources = tl.load(positions_before + at, mask=is_shared, other=0)
        targets = tl.load(positions + rank, mask=is_shared, other=0)
        inside = is_shared[:, None] & (columns < dim)[None, :]
        values = tl.load(buffer + sources[:, None] * dim + columns[None, :], mask=inside)
        tl.store(buffer + targets[:, None] * dim + columns[None, :], values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def write_back(  # type: ignore[no-untyped-def]
    buffer, host, distinct, positions, sizes, num_hot, dim, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Copy cold rows from the buffer to the host."""
    num_distinct, first_cold = tl.load(sizes), tl.load(sizes + 1)
    columns = tl.arange(0, WIDTH)
    for start in range(first_cold + tl.program_id(0) * ROWS, num_distinct, tl.num_programs(0) * ROWS):
        rank = start + tl.arange(0, ROWS)
        exists = rank < num_distinct
        sources = tl.load(positions + rank, mask=exists, other=0)
        targets = tl.load(distinct + rank, mask=exists, other=0).to(tl.int64) - num_hot
        inside = exists[:, None] & (columns < dim)[None, :]
        values = tl.load(buffer + sources[:, None] * dim + columns[None, :], mask=inside)
        tl.store(host + targets[:, None] * dim + columns[None, :], values, mask=inside)
