"""Time and bytes of a training step: a tensor-train table beside a plain one, on FBTT-Embedding's setting.

    python benchmarks/bench_tt.py [--rows 11000000 --dim 64 --ranks 32 --batch 512 --pooling 20 --steps 10]

A step is forward, backward and update (SGD), of one table, on ids drawn beforehand. Every contender runs in a
process of its own (forked), on one thread unless --threads says other. Prints a table, then one JSON line.

What it counts. `ns/lookup` divides the median step by batch x pooling lookups. `MB` is what the module holds
after the run: parameters, optimizer state, cache, counters. `GFLOP/s` divides the operations that one step
executes (two a multiply-add of the products with the cores, forward and backward, of the distinct ids, shared
prefixes once; pooling and update left out) by the time of that step. `RSS` is the peak of the whole process,
torch included.

What it does not show: quality, several tables, a GPU, or training with copies in the cache (`cache_gradient`
"cores"), which takes the time of "tt": only passes without gradients read those, timed as "tt serving" beside
"tt serving, cached".
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from slipstream.embedding.tt.bag import TTEmbeddingBag
from slipstream.embedding.tt.kernels import plan_contraction

CONTENDERS = ("nn.EmbeddingBag", "tt", "tt unfused", "tt cached rows", "tt serving", "tt serving, cached")
SIZES = ("rows", "dim", "ranks", "cores", "batch", "pooling", "steps", "cache", "threads")
WARM_UP = 3


def draw_ids(distribution: str, args: argparse.Namespace) -> list[Tensor]:
    """Draw the ids of every step; zipf has exponent 1.05, most frequent id first, as our rows are ranked."""
    rng = np.random.default_rng(0)
    shape = (args.steps + WARM_UP, args.batch, args.pooling)
    if distribution == "uniform":
        ids = rng.integers(0, args.rows, shape)
    else:
        cumulative = np.cumsum(np.arange(1, args.rows + 1, dtype=np.float64) ** -1.05)
        ids = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return list(torch.from_numpy(np.minimum(ids, args.rows - 1)).unbind(0))


def count_flop(bag: TTEmbeddingBag, ids: Tensor, *, trains: bool) -> int:
    """Count the operations of one step's products, from the plan that is executed."""
    unique = torch.unique(ids)
    if bag.counter is not None:
        unique = unique[~torch.isin(unique, bag.cache_ids)]
    plan = plan_contraction(unique, bag.tt_p_shapes, bag.tt_q_shapes, bag.tt_ranks, by_slice=True)
    flop, columns = 0, bag.tt_q_shapes[0]
    for k, level in enumerate(plan.levels[1:], start=1):
        product = 2 * columns * bag.tt_ranks[k] * bag.tt_q_shapes[k] * bag.tt_ranks[k + 1]
        flop += (3 if trains else 1) * product * level.digit.numel()  # a product has two gradients
        columns *= bag.tt_q_shapes[k]
    return flop


def build(label: str, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
    """Make a contender, and the optimizer that a step of it needs besides."""
    if label == "nn.EmbeddingBag":
        plain = torch.nn.EmbeddingBag(args.rows, args.dim, mode="sum", sparse=True)
        return plain, torch.optim.SGD(plain.parameters(), lr=0.01)
    bag = TTEmbeddingBag(
        args.rows,
        args.dim,
        [args.ranks] * (args.cores - 1),
        learning_rate=0.01,
        sparse=label != "tt unfused",
        use_cache="cached" in label,
        cache_size=args.cache,
        cache_gradient="rows" if label == "tt cached rows" else "cores",
    )
    return bag, None if bag.sparse else torch.optim.SGD(bag.parameters(), lr=0.01)


def make_step(label: str, args: argparse.Namespace) -> tuple[Callable[[Tensor], None], torch.nn.Module]:
    """Make what is timed, a step on the ids of one batch, and the module it works on."""
    module, optimizer = build(label, args)
    grad = torch.randn(args.batch, args.dim)

    def serve(ids: Tensor) -> None:
        with torch.no_grad():
            module(ids)

    def train(ids: Tensor) -> None:
        module(ids).backward(grad)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return (serve if "serving" in label else train), module


def run_contender(label: str, distribution: str, args: argparse.Namespace) -> dict[str, object]:
    """Time one contender in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    batches = draw_ids(distribution, args)
    run, module = make_step(label, args)
    for ids in batches[:WARM_UP]:
        run(ids)
    if "cached" in label:
        module.cache_populate()
        run(torch.cat(batches[:WARM_UP]) if "serving" in label else batches[0])
        module.cache_lookups.zero_()
    seconds = []
    for ids in batches[WARM_UP:]:
        start = time.perf_counter()
        run(ids)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    row: dict[str, object] = {
        "contender": label,
        "distribution": distribution,
        "ms_per_step": median * 1e3,
        "ns_per_lookup": median * 1e9 / (args.batch * args.pooling),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if not isinstance(module, TTEmbeddingBag):
        return row | {"bytes": sum(p.numel() * p.element_size() for p in module.parameters())}
    parts = module.memory_bytes()
    flops = [count_flop(module, ids, trains="serving" not in label) for ids in batches[WARM_UP:]]
    return row | {
        "bytes": sum(parts.values()),
        "bytes_parts": parts,
        "hit_ratio": module.hit_ratio,
        "flop_per_step": statistics.median(flops),
        "gflop_per_second": statistics.median(flops) / median / 1e9,
    }


def in_own_process(label: str, distribution: str, args: argparse.Namespace) -> dict[str, object]:
    """Run a contender in a forked process: torch is loaded once, memory and allocator are its own."""

    def work(answer: Connection) -> None:
        answer.send(run_contender(label, distribution, args))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        row: dict[str, object] = receiver.recv()
    except EOFError:
        raise SystemExit(f"{label} on {distribution} ids failed, see above") from None
    process.join()
    return row


def main() -> None:
    """Run every contender and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=11_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--cores", type=int, default=3, help="2 to 4")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pooling", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", type=int, default=0, help="cached rows; 0 for a hundredth of the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--distribution", choices=("uniform", "zipf", "both"), default="both")
    args = parser.parse_args()
    args.cache = args.cache or max(1, args.rows // 100)

    print(f"{args.rows} x {args.dim}, ranks {args.ranks}, {args.batch} bags of {args.pooling}, SGD")
    heads = f"{'ids':8}{'contender':19}{'ms/step':>8}{'ns/lookup':>10}{'MB':>9}{'GFLOP/s':>8}"
    print(f"{heads}{'hits':>6}{'RSS MB':>8}", flush=True)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # loads what optimizers load on first use, once
    results = []
    for distribution in ("uniform", "zipf") if args.distribution == "both" else (args.distribution,):
        for label in CONTENDERS:
            row = in_own_process(label, distribution, args)
            results.append(row)
            print(
                f"{distribution:8}{label:19}{row['ms_per_step']:8.2f}{row['ns_per_lookup']:10.0f}"
                f"{row['bytes'] / 1e6:9.2f}{row.get('gflop_per_second', 0):8.1f}"
                f"{row.get('hit_ratio', 0):6.2f}{row['peak_rss_bytes'] / 1e6:8.0f}",
                flush=True,
            )
    settings = {name: getattr(args, name) for name in SIZES}
    host = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"benchmark": "tt", "settings": settings, "host": host, "results": results}))


if __name__ == "__main__":
    main()
