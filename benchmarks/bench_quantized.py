"""Training step on few bits against fp32: time and memory.

    python benchmarks/bench_quantized.py
    python benchmarks/bench_quantized.py --rows 2000 --dim 8 --batch 64 --steps 3 --tables 4 --rounds 1

One large table and smaller ones (sizes evenly spaced on a log scale), one lookup per table and sample with a
skewed distribution, the pooled rows into an MLP 512-256-1, binary cross entropy, plain SGD. Each contender
runs in a process of its own, in turn over the rounds; a figure is the median over all timed steps. Times are
given for the whole step and for the embedding part alone (lookup, backward and update, without the MLP),
which hides nothing behind the MLP.

What it does not show: a GPU, real data, or quality; labels are random.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CONTENDERS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int4 period 200": {"bits": 4, "period": 200},
    "int4 period 1": {"bits": 4, "period": 1},
    "int4 per row": {"bits": 4, "scale_per": "row"},
    "int8 period 200": {"bits": 8, "period": 200},
    "int8 master": {"bits": 8, "period": 200, "master_dtype": "int8"},
    "int8 master, int4": {"bits": 4, "period": 200, "master_dtype": "int8"},
}


def main() -> None:
    """Run every contender and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender is not None:
        print(json.dumps(run(args)))
        return
    measured: dict[str, list[dict[str, Any]]] = {label: [] for label in CONTENDERS}
    for _ in range(args.rounds):
        for label in CONTENDERS:
            command = [sys.executable, __file__, "--contender", label, *sys.argv[1:]]
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[label].append(json.loads(answer.stdout.splitlines()[-1]))
    report(args, {label: merge(rounds) for label, rounds in measured.items()})


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60, help="timed steps a round, then as many without MLP")
    parser.add_argument("--tables", type=int, default=27, help="the large table and small ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contender", choices=list(CONTENDERS), help="run this one here and print JSON")
    return parser.parse_args()


def table_sizes(rows: int, num_tables: int) -> list[int]:
    """Give the large table, then sizes evenly spaced on a log scale from 4 to rows / 10."""
    most = max(rows // 10, 4)
    small = num_tables - 1
    return [rows] + [round(4 * (most / 4) ** (k / max(small - 1, 1))) for k in range(small)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process."""
    import torch
    from torch import nn

    from slipstream.embedding.quantized import QuantizedEmbeddingBag

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    sizes = table_sizes(args.rows, args.tables)
    options = CONTENDERS[args.contender]
    bags: list[Any] = []
    for size in sizes:
        if options is None:
            bag = nn.EmbeddingBag(size, args.dim, mode="sum", sparse=True)
            nn.init.uniform_(bag.weight, -(size**-0.5), size**-0.5)
            bags.append(bag)
        else:
            bags.append(QuantizedEmbeddingBag(size, args.dim, generator=generator, **options))
    is_int8 = bool(options) and options.get("master_dtype") == "int8"
    mlp = nn.Sequential(
        nn.Linear(len(sizes) * args.dim, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1)
    )
    parameters = [*mlp.parameters(), *(p for bag in bags for p in bag.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=args.lr)
    offsets = torch.arange(args.batch)
    batches = [make_batch(torch, sizes, args.batch, seed) for seed in range(16)]
    upstream = torch.randn(args.batch, len(sizes) * args.dim) * 1e-3

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if is_int8:
            for bag in bags:
                bag.apply_gradients(lr=args.lr)

    def look_up(batch: Any) -> Any:
        return torch.cat([bag(ids, offsets) for bag, ids in zip(bags, batch, strict=True)], 1)

    def step(index: int) -> None:
        ids, labels = batches[index % len(batches)]
        loss = nn.functional.binary_cross_entropy_with_logits(mlp(look_up(ids)).squeeze(1), labels)
        loss.backward()
        update()

    def embedding_step(index: int) -> None:
        look_up(batches[index % len(batches)][0]).backward(upstream)
        update()

    step_seconds = timed(step, args.steps)
    embedding_seconds = timed(embedding_step, args.steps)
    table_bytes = sum(
        bag.weight.numel() * 4 if isinstance(bag, nn.EmbeddingBag) else bag.memory_bytes() for bag in bags
    )
    return {
        "step_seconds": step_seconds,
        "embedding_seconds": embedding_seconds,
        "table_bytes": table_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
    }


def make_batch(torch: Any, sizes: list[int], batch: int, seed: int) -> tuple[list[Any], Any]:
    """Skewed ids, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = [(torch.rand(batch, generator=generator) ** 4 * size).long() for size in sizes]
    return ids, torch.randint(0, 2, (batch,), generator=generator).float()


def timed(step: Callable[[int], None], steps: int) -> list[float]:
    """Seconds of each step, after a warm-up."""
    warm_up = min(5, steps)
    seconds = []
    for index in range(warm_up + steps):
        start = time.perf_counter()
        step(index)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def merge(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and a mean: a refresh every 200 steps hides in a median."""
    steps = [s for r in rounds for s in r["step_seconds"]]
    embedding = [s for r in rounds for s in r["embedding_seconds"]]
    return {
        "step_ms": statistics.median(steps) * 1e3,
        "embedding_ms": statistics.median(embedding) * 1e3,
        "embedding_mean_ms": statistics.mean(embedding) * 1e3,
        "table_bytes": rounds[0]["table_bytes"],
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
        "torch": rounds[0]["torch"],
    }


def report(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print the table for people, then the JSON line."""
    base = results["fp32"]
    print(
        f"{args.tables} tables, the largest {args.rows} x {args.dim}, batch {args.batch}, "
        f"{args.threads} thread(s), median of {args.rounds} x {args.steps} steps\n"
    )
    header = "contender", "step ms", "ratio", "emb. ms", "ratio", "mean", "tables MB", "peak RSS MB"
    print("{:<18} {:>8} {:>6} {:>8} {:>6} {:>6} {:>10} {:>12}".format(*header))
    for label, r in results.items():
        r["step_ratio"] = r["step_ms"] / base["step_ms"]
        r["embedding_ratio"] = r["embedding_ms"] / base["embedding_ms"]
        print(
            f"{label:<18} {r['step_ms']:>8.2f} {r['step_ratio']:>6.2f} {r['embedding_ms']:>8.2f} "
            f"{r['embedding_ratio']:>6.2f} {r['embedding_mean_ms']:>6.2f} "
            f"{r['table_bytes'] / 1e6:>10.2f} {r['peak_bytes'] / 1e6:>12.0f}"
        )
    options = {key: value for key, value in vars(args).items() if key != "contender"}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"benchmark": "quantized", **machine, "options": options, "results": results}))


if __name__ == "__main__":
    main()
