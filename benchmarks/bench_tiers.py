"""Embedding rows alone: look up, sum gradients, update, as dynamicemb's benchmark has it.

    python benchmarks/bench_tiers.py --device cuda                    # 10 tables of 20M rows of 128 floats
    python benchmarks/bench_tiers.py --rows 2000 --samples 64 --distinct 0.4 --steps 4 --passes 2 --rounds 1   # toy

1.05M ids a step over ten tables, forward, backward from a fixed upstream gradient, update by SGD. Ids are drawn from a
power law whose exponent is chosen so that a step has as many distinct ids as there (434k), whatever the tables' size:
26.8M rows a table, as published, would take 137 GB of host memory.

    hbm            all rows on the device, 1.68M a table
    plain          the same in one nn.Embedding a table with sparse gradients and torch.optim.SGD
    in-place S     rows of the tables on the host; on the device popular ones, S times as many as a step's distinct ids
    look-ahead S   the same, with cold rows gathered by the host

Published for one H100 (NVIDIA recsys-examples, 2026-05-26), ms a step, FBGEMM / dynamicemb: `hbm` .96 / 1.92, a cache
of 1.0 times 4.15 / 10.87, of .8 times 4.77 / 20.83, none 13.56 / 35.46. Their caches start cold and follow the ids;
here the popular rows are known beforehand, as they are after `slipstream profile`. On a CPU both tiers are one memory,
and figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from processes import peak_mb, run_apart
from torch import nn

from slipstream.embedding.tiers.batch_plan import BatchPlan, RowsInPlace
from slipstream.embedding.tiers.in_place import InPlace, Runner
from slipstream.embedding.tiers.lookahead import Batch, LookAhead, StagedBatch
from slipstream.embedding.tiers.mapped import map_to_device
from slipstream.embedding.tiers.placement import StagingHalves
from slipstream.embedding.tiers.row_access import RowAccess, StagedAccess
from slipstream.embedding.tiers.rows import TieredRows

CONTENDERS = ["hbm", "plain", "in-place 1", "in-place 0.8", "in-place 0", "look-ahead 1", "look-ahead 0"]
HBM_SHARE = 1.68 / 20
"""Rows a table that fit the device, of those that fit the host."""
RATES = {"H100": (3.35e12, 64e9), "H200": (4.8e12, 64e9)}
"""Bytes/s of memory, and of the bus each way."""
EAGER_STEPS = 3


def draw_ranks(rng: np.random.Generator, exponent: float, num_rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Ranks by popularity, 0 the most popular, by the inverse of a power law's distribution. int64."""
    power = 1.0 - exponent
    drawn = ((((num_rows + 1) ** power - 1.0) * rng.random(shape) + 1.0) ** (1.0 / power)).astype(np.int64) - 1
    return np.clip(drawn, 0, num_rows - 1)


def match_exponent(args: argparse.Namespace, num_rows: int) -> float:
    """Find the exponent with which a step has as many distinct ids as asked for."""
    low, high = 0.05, 2.45
    for _ in range(20):
        middle = (low + high) / 2 + 1e-9
        ranks = draw_ranks(np.random.default_rng(0), middle, num_rows, (args.samples, args.tables))
        distinct = sum(len(np.unique(column)) for column in ranks.T) / ranks.size
        low, high = (middle, high) if distinct > args.distinct else (low, middle)
    return low


def make_batches(args: argparse.Namespace, num_rows: int) -> list[Batch]:
    """Slots over all tables, the popular rows of each first."""
    exponent, rng = match_exponent(args, num_rows), np.random.default_rng(1)
    nothing = np.zeros((args.samples, 1), np.float32), np.zeros(args.samples, np.float32)
    batches = []
    for _ in range(args.steps):
        ranks = draw_ranks(rng, exponent, num_rows, (args.samples, args.tables))
        slots = (ranks * args.tables + np.arange(args.tables)).astype(np.int32)
        batches.append(Batch(dense=nothing[0], slots=slots, labels=nothing[1], is_hot=False))
    return batches


class Step:
    """Looks up and updates the rows of a batch; on CUDA in a graph of its own for each half of the buffer."""

    def __init__(self, rows: TieredRows, *, num_lookups: int, most_distinct: int) -> None:
        self._rows, self._rule = rows, rows.rule()
        self._upstream = torch.full((num_lookups, rows.embedding_dim), 1e-3, device=rows.device)
        self._lr = torch.full((), 0.01, device=rows.device)
        self._padding = rows.padding(most_distinct)
        self._graphs: dict[RowsInPlace, torch.cuda.CUDAGraph] = {}
        self._num_steps = 0

    def __call__(self, batch: StagedBatch) -> None:
        """Take a step."""
        self._num_steps += 1
        in_place = batch.in_place
        if in_place is None or self._rows.device.type != "cuda" or self._num_steps <= 2 * EAGER_STEPS:
            self._compute(batch)
            return
        if in_place not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute(batch)
            self._graphs[in_place] = graph
        self._graphs[in_place].replay()

    def _compute(self, batch: StagedBatch) -> None:
        if batch.in_place is not None:
            batch.in_place.begin()
            access: RowAccess = batch.in_place.plan
        else:
            distinct = batch.find_distinct(padding=self._padding)
            access = StagedAccess(rows=self._rows, distinct=distinct, deterministic=False)
        access.look_up(batch.num_lookups())
        access.update(self._rule, self._upstream, lr=self._lr)
        if batch.in_place is not None:
            batch.in_place.end()


def make_tiers(name: str, share: float, args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, float]]:
    """Give one pass over all batches, and what it moves at least."""
    device = torch.device(args.device)
    num_rows = max(1, round(args.rows * HBM_SHARE)) if name == "hbm" else args.rows
    batches = make_batches(args, num_rows)
    num_lookups = args.samples * args.tables
    distinct = [np.unique(batch.slots) for batch in batches]
    hot = round(share * statistics.median(map(len, distinct)) / args.tables) * args.tables
    num_hot = num_rows * args.tables if name == "hbm" else min(hot, num_rows * args.tables)
    most_distinct = args.tables * min(args.samples, num_rows)
    rows = TieredRows(
        num_rows=num_rows * args.tables,
        num_hot=num_hot,
        embedding_dim=args.dim,
        num_staged=2 * min(most_distinct, num_rows * args.tables - num_hot),
        optimizer="sgd",
        device=device,
    )
    if name == "look-ahead":
        runner: Runner = LookAhead(rows, StagingHalves(rows), chunk_batches=1, sorts_all=device.type == "cpu")
    else:
        make_plan: type[BatchPlan] = BatchPlan
        if device.type == "cuda":
            from slipstream.embedding.tiers.triton_plan import TritonPlan as make_plan  # needs Triton
        runner = InPlace(
            rows,
            map_to_device(rows.on_host, device),
            batch_size=args.samples,
            num_columns=args.tables,
            most_distinct=most_distinct,
            make_plan=make_plan,
        )
    step = Step(rows, num_lookups=num_lookups, most_distinct=most_distinct)
    num_distinct = statistics.mean(map(len, distinct))
    num_cold = statistics.mean(int((slots >= num_hot).sum()) for slots in distinct)
    row_bytes = 4 * args.dim
    least = {
        "distinct_rows": num_distinct,
        "cold_rows": num_cold,
        "least_hbm_mb": (row_bytes * 2 * (num_lookups + num_distinct) + 4 * num_lookups) / 1e6,
        "least_bus_mb": 2 * num_cold * row_bytes / 1e6,
    }
    return lambda: run_over(runner, batches, step), least


def run_over(runner: Runner, batches: list[Batch], step: Step) -> None:
    """Train on every batch and wait."""
    runner.run(iter(batches), step)
    runner.flush()


def make_plain(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, float]]:
    """Give one pass with a torch module a table."""
    device = torch.device(args.device)
    num_rows = max(1, round(args.rows * HBM_SHARE))
    batches = make_batches(args, num_rows)
    tables = nn.ModuleList(nn.Embedding(num_rows, args.dim, sparse=True, device=device) for _ in range(args.tables))
    optimizer = torch.optim.SGD(tables.parameters(), lr=0.01)
    upstream = torch.full((args.samples, args.dim), 1e-3, device=device)

    def run() -> None:
        for batch in batches:
            rows = torch.from_numpy(batch.slots).to(device).long() // args.tables
            optimizer.zero_grad()
            for at, table in enumerate(tables):
                table(rows[:, at]).backward(upstream)
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, {"distinct_rows": statistics.mean(len(np.unique(batch.slots)) for batch in batches)}


def measure(contender: str, args: argparse.Namespace) -> None:
    """Warm up with one pass, time a few more, and print a JSON line."""
    name, _, share = contender.partition(" ")
    run, figures = make_plain(args) if name == "plain" else make_tiers(name, float(share or 0), args)
    run()
    seconds, started = [], time.process_time()
    for _ in range(args.passes):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    core_seconds = time.process_time() - started
    median = statistics.median(seconds)
    figures |= {
        "ms_per_step": 1e3 * median / args.steps,
        "spread": (max(seconds) - min(seconds)) / median,
        "host_core_ms_per_step": 1e3 * core_seconds / args.passes / args.steps,
        "peak_host_bytes": peak_mb() * 2**20,
    }
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else ""
    for model, (hbm, bus) in RATES.items():
        if model in hardware and "least_hbm_mb" in figures:
            # rows cross the bus both ways at once
            figures["floor_ms"] = 1e9 * max(figures["least_hbm_mb"] / hbm, figures["least_bus_mb"] / 2 / bus)
    print(json.dumps(figures))


def show(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Give the table."""
    yield (
        f"{'contender':<16}{'ms/step':>10}{'spread':>9}{'floor ms':>10}{'core-ms/step':>14}{'distinct':>11}{'cold':>10}"
        f"{'HBM MB':>9}{'bus MB':>9}"
    )
    for name, one in results.items():
        rest = [f"{one[key]:,.2f}" if key in one else "-" for key in ("floor_ms",)]
        counts = [f"{one[key]:,.0f}" if key in one else "-" for key in ("distinct_rows", "cold_rows")]
        moved = [f"{one[key]:,.1f}" if key in one else "-" for key in ("least_hbm_mb", "least_bus_mb")]
        times = f"{one['ms_per_step']:>10.2f}{one['spread']:>9.1%}{rest[0]:>10}{one['host_core_ms_per_step']:>14.2f}"
        yield f"{name:<16}{times}{counts[0]:>11}{counts[1]:>10}{moved[0]:>9}{moved[1]:>9}"


def main() -> None:
    """Measure, show, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--contender", help="measure this one alone, and print a JSON line")
    parser.add_argument("--tables", type=int, default=10)
    parser.add_argument("--rows", type=int, default=20_000_000, help="of each table")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=104_858, help="a step has this times the tables ids")
    parser.add_argument("--distinct", type=float, default=0.414, help="distinct ids, as a share of a step's ids")
    parser.add_argument("--steps", type=int, default=20, help="of a pass")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.contender:
        measure(args.contender, args)
        return
    runs: dict[str, list[dict[str, Any]]] = {name.strip(): [] for name in args.contenders.split(",")}
    for _ in range(args.rounds):
        for name, measured in runs.items():
            measured.append(run_apart(__file__, name, sys.argv[1:]))
    results = {
        name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{args.tables} tables of {args.rows:,} rows of {args.dim}, {args.samples * args.tables:,} ids, {hardware}")
    print("\n".join(show(results)))
    print(json.dumps({"benchmark": "tiers", "hardware": hardware, "args": vars(args), "results": results}))


if __name__ == "__main__":
    main()
