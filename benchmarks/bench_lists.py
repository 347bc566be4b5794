"""Lists of values: preprocess beside plain columns, and a training step beside `nn.EmbeddingBag`.

    python benchmarks/bench_lists.py
    python benchmarks/bench_lists.py --rows 1000000 --steps 100

Preprocess reads one table twice: with up to six tags of a line in one field, and with the same tags in six fields of
their own. Training: a DLRM over eight single columns and a list of up to six values, trained by slipstream with all
rows on one device, host work included, and by a plain loop over `nn.EmbeddingBag` with padding and torch's optimizers;
and for scale by slipstream with the first value of each list alone. Making tables is not measured. Contenders take
turns; figures are processor seconds, the least of the rounds.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.config import build_pipeline
from slipstream.embedding.tiers.lookahead import Batch, LookAhead
from slipstream.models.dlrm import DLRM
from slipstream.options import pick
from slipstream.pipeline import run_pipeline
from slipstream.schema import Bag
from slipstream.training.assemble import Design, Settings, assemble
from slipstream.training.representations import TableSpec
from slipstream.training.slot_layout import SlotLayout

LENGTH, NUM_SINGLE, NUM_DENSE, DIM, LR = 6, 8, 4, 16, 0.01


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="lines of the table")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--table-rows", type=int, default=100_000, help="rows of each table that is trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for scratch files; None for the system's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        results = measure_preprocess(Path(work), options)
    results |= measure_training(options)
    show(results, options)


def take_turns(contenders: dict[str, Callable[[int], Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Least processor seconds of each contender; each gets ready for a round first, which is not measured."""
    least = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds):
        for name, get_ready in contenders.items():
            run = get_ready(number)
            started = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - started)
    return least


# --- preprocess ----------------------------------------------------------------------------------------------


def measure_preprocess(work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of preprocess, by how the tags stand in the file."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, LENGTH + 1, options.rows)
    drawn = rng.zipf(1.3, (options.rows, LENGTH)) % 20_000
    tags = [[f"t{tag}" for tag in row[:length]] for row, length in zip(drawn.tolist(), lengths, strict=True)]
    common = {
        "clicked": rng.integers(0, 2, options.rows),
        "user": rng.integers(0, 50_000, options.rows),
        "item": rng.zipf(1.3, options.rows) % 50_000,
        "price": rng.random(options.rows).round(3),
    }
    filled = [[*row, *[""] * (LENGTH - len(row))] for row in tags]
    apart = {f"tag_{at}": [row[at] for row in filled] for at in range(LENGTH)}
    pl.DataFrame(common | {"tags": ["|".join(row) for row in tags]}).write_csv(work / "list.csv")
    pl.DataFrame(common | apart).write_csv(work / "columns.csv")
    columns: dict[str, dict[str, Any]] = {
        "list": {"sparse": ["user", "item"], "lists": {"tags": {"length": LENGTH}}},
        "columns": {"sparse": ["user", "item", *apart]},
    }

    def preprocess(name: str) -> Callable[[int], Callable[[], object]]:
        tree = {
            "name": name,
            "dataset": {
                "source": "table",
                "raw": str(work / f"{name}.csv"),
                "columns": {"label": "clicked", "dense": ["price"]} | columns[name],
            },
        }
        config = build_pipeline(tree)
        return lambda number: lambda: run_pipeline(config, work / f"{name}-{number}", stages=["preprocess"])

    found = take_turns({name: preprocess(name) for name in columns}, options.rounds)
    return {f"preprocess, tags as {name}": seconds for name, seconds in found.items()}


# --- training ------------------------------------------------------------------------------------------------


def measure_training(options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of so many steps."""
    rng = np.random.default_rng(1)
    num_samples, num_rows = options.batch * options.steps, options.table_rows
    single = rng.zipf(1.2, (num_samples, NUM_SINGLE)) % (num_rows - 1) + 1
    values = rng.zipf(1.2, (num_samples, LENGTH)) % (num_rows - 1) + 1
    values[np.arange(LENGTH) >= rng.integers(0, LENGTH + 1, num_samples)[:, None]] = 0  # row 0 stands for padding here
    dense = rng.random((num_samples, NUM_DENSE), np.float32)
    labels = rng.integers(0, 2, num_samples).astype(np.float32)
    cuts = range(0, num_samples + 1, options.batch)
    pieces = [slice(start, stop) for start, stop in pairwise(cuts)]
    rest = (dense, labels, pieces, num_rows)
    contenders: dict[str, Callable[[int], Callable[[], object]]] = {
        "train, slipstream": lambda number: prepare(single, values, *rest),
        "train, nn.EmbeddingBag": lambda number: prepare_plainly(single, values, *rest),
        "train, first values alone": lambda number: prepare(single, values[:, :1], *rest),
    }
    return take_turns(contenders, options.rounds)


def network(num_fields: int) -> nn.Module:
    """Make the same layers each time."""
    torch.manual_seed(0)
    model = DLRM(embedding_dim=DIM, bottom_mlp=(32, DIM), top_mlp=(64, 1))
    return model.build(num_dense=NUM_DENSE, num_columns=num_fields)


def prepare(
    single: np.ndarray, values: np.ndarray, dense: np.ndarray, labels: np.ndarray, pieces: list[slice], num_rows: int
) -> Callable[[], object]:
    """Get ready to train as slipstream does; a list of one column is a single value."""
    names = [f"cat_{at}" for at in range(NUM_SINGLE + 1)]
    slot_maps = {name: np.arange(at * num_rows, (at + 1) * num_rows, dtype=np.int32) for at, name in enumerate(names)}
    length, is_list = values.shape[1], values.shape[1] > 1
    config = build_pipeline(
        {
            "name": "lists",
            "dataset": {"source": "synthetic"},
            "model": {"embedding_dim": DIM, "bottom_mlp": [32, DIM], "top_mlp": [64, 1]},
            "train": {"mode": "resident", "optimizer": "adagrad", "batch_size": pieces[0].stop},
        }
    )
    parts = assemble(
        Design(
            settings=pick(Settings, config.train),
            layout=SlotLayout(
                slot_maps, num_hot=num_rows * len(names), table_of_column=[*range(NUM_SINGLE), *[NUM_SINGLE] * length]
            ),
            specs=[TableSpec(name=name, num_rows=num_rows) for name in names],
            padding_rows={names[-1]: 0} if is_list else {},
            bags=[Bag(columns=tuple(range(NUM_SINGLE, NUM_SINGLE + length)), pooling="mean")] if is_list else (),
            counts=np.zeros(num_rows * len(names), np.int64),
            network=config.model,
            linear_bits=0,
            num_dense=NUM_DENSE,
        ),
        seed=0,
        device=torch.device("cpu"),
    )
    starts = np.array([*range(NUM_SINGLE), *[NUM_SINGLE] * length]) * num_rows
    slots = (np.concatenate([single, values], axis=1) + starts).astype(np.int32)
    lookahead = LookAhead(parts.rows, parts.placement, chunk_batches=16, padding=parts.representations.padded)  # type: ignore[arg-type]
    batches = (Batch(dense=dense[at], slots=slots[at], labels=labels[at], is_hot=True) for at in pieces)
    return lambda: lookahead.run(batches, lambda batch: parts.step(batch, LR))


def prepare_plainly(
    single: np.ndarray, values: np.ndarray, dense: np.ndarray, labels: np.ndarray, pieces: list[slice], num_rows: int
) -> Callable[[], object]:
    """Get ready to train with modules and optimizers of torch."""
    tables = nn.ModuleList(nn.EmbeddingBag(num_rows, DIM, mode="sum", sparse=True) for _ in range(NUM_SINGLE))
    tables.append(nn.EmbeddingBag(num_rows, DIM, mode="mean", sparse=True, padding_idx=0))
    model = network(NUM_SINGLE + 1)
    optimizers = [torch.optim.Adagrad(part.parameters(), lr=LR, eps=1e-10) for part in (tables, model)]

    def step(at: slice) -> None:
        rows, of_list = torch.from_numpy(single[at]), torch.from_numpy(values[at])
        columns = [rows[:, place : place + 1] for place in range(NUM_SINGLE)]
        pooled = [table(given) for table, given in zip(tables, [*columns, of_list], strict=True)]
        logits = model(torch.from_numpy(dense[at]), torch.stack(pooled, dim=1))
        for optimizer in optimizers:
            optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, torch.from_numpy(labels[at])).backward()
        for optimizer in optimizers:
            optimizer.step()

    def train() -> None:
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            for at in pieces:
                step(at)

    return train


def show(results: dict[str, float], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    beside = {"preprocess": "preprocess, tags as columns", "train": "train, nn.EmbeddingBag"}
    print(f"{options.rows:,} lines; {options.steps} steps of {options.batch:,} samples, 1 thread")
    print(f"{'':<30}{'processor s':>12}{'ratio':>8}")
    for name, seconds in results.items():
        print(f"{name:<30}{seconds:>12.2f}{seconds / results[beside[name.partition(',')[0]]]:>8.2f}")
    print(json.dumps({"benchmark": "lists", "results": results}))


if __name__ == "__main__":
    main()
