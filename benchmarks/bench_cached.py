"""CachedEmbeddingBag at 1 % of the rows against an uncached nn.EmbeddingBag.

    python benchmarks/bench_cached.py
    python benchmarks/bench_cached.py --rows 20000 --batch 64 --steps 8 --cache-ratio 0.1 --rounds 1

One table, bags of 1 to 20 lookups, Zipf-distributed rows numbered by popularity, sum pooling, a fixed
upstream gradient, SGD with sparse gradients. A step is forward, backward and update, and with look-ahead its
share of the prefetch. Each contender runs in a process of its own, in turn over the rounds; times are medians
over all timed steps, of the wall clock and of the processor (where they differ much, the host was busy), and
the ratio is of processor times. The cache starts from counts of other batches of the same distribution.

What it does not show: a GPU, which is what the cache is for. On a CPU "device" and host are one memory, so
the uncached bag is the ceiling, and the ratio to it is the price of the cache: bookkeeping and, for every
miss, two copies out and two home. Row-wise Adagrad does more work than the SGD it is compared with.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from typing import Any

import numpy as np
import torch

from slipstream.embedding.cached.bag import CachedEmbeddingBag

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "uncached": None,
    "lfu": {"evict_strategy": "lfu"},
    "lfu, prefetch 8": {"evict_strategy": "lfu", "prefetch": 8},
    "dataset": {"evict_strategy": "dataset"},
    "dataset, prefetch 8": {"evict_strategy": "dataset", "prefetch": 8},
    "lfu, row-wise adagrad": {"evict_strategy": "lfu", "optimizer": "rowwise_adagrad"},
}


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    measured: dict[str, list[dict[str, Any]]] = {label: [] for label in CONTENDERS}
    # Forked from a process that has only imported torch (the first optimizer imports the other half of it):
    # that is paid once, and nothing else is shared.
    torch.optim.SGD([torch.zeros(1)])
    context = multiprocessing.get_context("fork")
    for _ in range(args.rounds):
        for label in CONTENDERS:
            with context.Pool(1) as pool:
                measured[label].append(pool.apply(run, (label, args)))
    report(args, {label: merge(rounds) for label, rounds in measured.items()})


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--max-lookups", type=int, default=20, help="bags have 1 to this many")
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the popularity, not 1")
    parser.add_argument("--cache-ratio", type=float, default=0.01)
    parser.add_argument("--warmup-steps", type=int, default=8)
    parser.add_argument("--steps", type=int, default=96, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def run(label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    num_batches = args.warmup_steps + args.steps
    batches = [make_batch(args, rng) for _ in range(num_batches)]
    counts = np.zeros(args.rows, np.int32)
    for _ in range(min(num_batches, 100)):
        counts += np.bincount(make_batch(args, rng)[0], minlength=args.rows).astype(np.int32)
    inputs = [(torch.from_numpy(ids), torch.from_numpy(offsets)) for ids, offsets in batches]
    upstream = torch.randn(args.batch, args.dim) * 1e-3
    options = dict(CONTENDERS[label] or {})
    prefetch = options.pop("prefetch", 1)
    bag = make_bag(args, options, counts, is_cached=CONTENDERS[label] is not None)
    sgd = None if options.get("optimizer") else torch.optim.SGD(bag.parameters(), lr=0.01)

    def step(ids: Any, offsets: Any) -> None:
        bag(ids, offsets).backward(upstream)
        if sgd is None:
            bag.step()
        else:
            sgd.step()
            sgd.zero_grad()

    wall_ms: list[float] = []
    cpu_ms: list[float] = []
    covers: list[int] = []
    bytes_at_start = hits_at_start = misses_at_start = done = 0
    is_cached = hasattr(bag, "prefetch")
    while done < num_batches:
        if is_cached and done <= args.warmup_steps:
            bytes_at_start = bag.bytes_to_device + bag.bytes_to_host
            hits_at_start, misses_at_start = bag.hits, bag.misses
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        covered = 1
        if prefetch > 1:
            covered = bag.prefetch([ids for ids, _ in inputs[done : done + prefetch]])
        for ids, offsets in inputs[done : done + covered]:
            step(ids, offsets)
        if done >= args.warmup_steps:
            wall_ms += [(time.perf_counter() - wall_start) / covered * 1e3] * covered
            cpu_ms += [(time.process_time() - cpu_start) / covered * 1e3] * covered
            covers.append(covered)
        done += covered
    result: dict[str, Any] = {
        "wall_ms": wall_ms,
        "cpu_ms": cpu_ms,
        "batches_per_prefetch": statistics.mean(covers),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "lookups_per_batch": statistics.mean(ids.size for ids, _ in batches),
        "rows_per_batch": statistics.mean(np.unique(ids).size for ids, _ in batches),
    }
    if is_cached:
        hits, misses = bag.hits - hits_at_start, bag.misses - misses_at_start
        moved = bag.bytes_to_device + bag.bytes_to_host - bytes_at_start
        result |= {"hit_ratio": hits / (hits + misses), "moved_kb_per_step": moved / 1024 / len(wall_ms)}
        result |= {"memory_bytes": bag.memory_bytes()}
    return result


def make_bag(args: argparse.Namespace, options: dict[str, Any], counts: Any, *, is_cached: bool) -> Any:
    """Build the module: both kinds start from the same table."""
    table = torch.empty(args.rows, args.dim).uniform_(-0.01, 0.01)
    if not is_cached:
        return torch.nn.EmbeddingBag(args.rows, args.dim, mode="sum", sparse=True, _weight=table)
    return CachedEmbeddingBag(
        args.rows,
        args.dim,
        mode="sum",
        sparse="optimizer" not in options,
        cache_ratio=args.cache_ratio,
        ids_freq_mapping=counts,
        warmup_ratio=1.0,
        _weight=table,
        **options,
    )


def make_batch(args: argparse.Namespace, rng: Any) -> tuple[Any, Any]:
    """Draw ragged bags of Zipf-distributed rows, row 0 the most popular: ids and offsets."""
    lengths = rng.integers(1, args.max_lookups + 1, args.batch)
    power = 1 - args.zipf
    u = rng.random(lengths.sum())
    rows = ((args.rows + 1.0) ** power * u + (1 - u)) ** (1 / power) - 1
    return np.minimum(rows.astype(np.int64), args.rows - 1), np.cumsum(lengths) - lengths


def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the rounds of one contender: the median over all steps, other figures of the last round."""
    medians = {
        name: statistics.median(t for measured in rounds for t in measured[name]) for name in ("wall_ms", "cpu_ms")
    }
    return {**rounds[-1], **medians}


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print the table, then one JSON line."""
    base = results["uncached"]
    print(
        f"{args.rows:,} rows x {args.dim}, batch {args.batch}, {base['lookups_per_batch']:,.0f} lookups of "
        f"{base['rows_per_batch']:,.0f} distinct rows, zipf {args.zipf}, cache {args.cache_ratio:.1%}, "
        f"{args.threads} thread(s), {platform.machine()}"
    )
    print(
        f"{'contender':23}{'wall ms':>8}{'cpu ms':>8}{'speed':>8}{'hits':>8}{'KB/step':>9}{'ahead':>7}"
        f"{'cache MB':>10}{'maps MB':>9}{'host MB':>9}"
    )
    for label, result in results.items():
        result["speed_ratio"] = base["cpu_ms"] / result["cpu_ms"]
        line = f"{label:23}{result['wall_ms']:8.2f}{result['cpu_ms']:8.2f}{result['speed_ratio']:7.2f}x"
        if "hit_ratio" in result:
            megabytes = {name: size / 2**20 for name, size in result["memory_bytes"].items()}
            line += f"{result['hit_ratio']:8.4f}{result['moved_kb_per_step']:9.0f}"
            line += f"{result['batches_per_prefetch']:7.1f}"
            line += f"{megabytes['cache']:10.1f}{megabytes['maps']:9.1f}{megabytes['host']:9.1f}"
        print(line)
    print(json.dumps({"benchmark": "cached", "arguments": vars(args), "results": results}))


if __name__ == "__main__":
    main()
