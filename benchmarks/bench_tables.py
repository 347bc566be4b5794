"""How tables are held: bytes, quality and the time of a step, for one pipeline.

    python benchmarks/bench_tables.py         the shipped `tiny`: synthetic data, figures of a toy
    python benchmarks/bench_tables.py --pipeline pipelines/criteo_kaggle.toml --raw train.txt --seeds 3

Contenders: fp32 rows; int8 and int4 trained on their grid; int4 after training, by `export model`; large tables as
tensor-train cores; int4 with int8 layers. Every contender sees the same samples, order and seeds. Changes of AUC are
paired by seed, with their standard error. Steps are timed on real batches, all rows on one device, contenders taking
turns batch by batch in one process, so that a noisy host disturbs all alike; the ratio is of medians.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.config import PipelineConfig, load_pipeline
from slipstream.embedding.duplicates import Distinct, sort_lookups
from slipstream.embedding.tiers.lookahead import StagedBatch
from slipstream.io.artifacts import Artifact
from slipstream.io.samples import concat_samples, read_shard
from slipstream.ops.metrics import measure_quality
from slipstream.options import pick
from slipstream.pipeline import export_model, run_pipeline
from slipstream.stages import evaluate
from slipstream.training.assemble import Settings, assemble
from slipstream.training.order.shards import read_slot_maps
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import TrainStep
from slipstream.wiring import choose_tables

ROOT = Path(__file__).parent.parent


def contenders(options: argparse.Namespace) -> dict[str, list[str]]:
    """Give overrides of each."""
    tt_rows, tt_rank = options.tt_rows, options.tt_rank
    every = {
        "fp32": [],
        **{f"fp32, {epochs} epochs": [f"train.epochs={epochs}"] for epochs in range(2, options.max_epochs + 1)},
        "int8": ["tables.representation=int8"],
        "int4": ["tables.representation=int4"],
        "int4 + int8 layers": ["tables.representation=int4", "tables.quantize_linears=8"],
        "tt": [
            f"tables.rules=[{{min_rows = {tt_rows}, representation = 'tt', tt_ranks = [{tt_rank}, {tt_rank}]}}]",
        ],
    }
    left_out = {name.strip() for name in options.without.split(",")}
    return {name: overrides for name, overrides in every.items() if name not in left_out}


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    base = ["train.mode=resident", "train.device=cpu", "train.num_threads=1"]
    if options.raw:
        base.append(f"dataset.raw={options.raw}")
    base += options.overrides
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(options.runs or scratch)
        rows = quality_of_all(options, base, runs, Path(scratch))
        configs = {
            name: load_pipeline(options.pipeline, [*base, *extra]) for name, extra in contenders(options).items()
        }
        segregated = run_pipeline(configs["fp32"], runs).stages["segregate"].artifact
        seconds = time_steps(configs, segregated, steps=options.steps)
    for name, timed in seconds.items():
        rows[name]["step_ms"] = 1000 * timed
        rows[name]["step_ratio"] = timed / seconds["fp32"]
    show(rows, options)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=ROOT / "pipelines/tiny.toml")
    parser.add_argument("--raw", default="", help="dataset.raw of the pipeline")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=1, help="fp32 is also trained for 2, 3, … up to this")
    parser.add_argument("--steps", type=int, default=400, help="timed steps; half as many warm up")
    parser.add_argument("--tt-rows", type=int, default=1000, help="tables from this size on are cores in `tt`")
    parser.add_argument("--tt-rank", type=int, default=16)
    parser.add_argument("--without", default="", help="contenders to leave out, for instance tt")
    parser.add_argument("--runs", default="", help="folder to keep runs in; finished ones are not done again")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def quality_of_all(
    options: argparse.Namespace, base: list[str], runs: Path, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Train every contender with every seed."""
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(options.seeds):
        for name, extra in contenders(options).items():
            config = load_pipeline(options.pipeline, [*base, *extra, f"train.seed={seed}"])
            result = run_pipeline(config, runs)
            trained, counts = result.stages["train"].artifact, result.counts("train")
            auc = (counts["test"]["auc"] + counts["val"]["auc"]) / 2
            note(rows, name, auc, trained.path, result.counts("segregate"))
            if name.startswith("fp32") and options.max_epochs > 1:
                stop_early(rows, seed, counts, trained.path, result.counts("segregate"))
            if name == "fp32":
                out = scratch / f"packed-{seed}"
                export_model(trained.path, representation="int4", out_dir=out)
                auc = statistics.mean(disk_auc(out, result.stages["segregate"].artifact, s) for s in ("test", "val"))
                note(rows, "int4 after training", auc, out, result.counts("segregate"))
    for row in rows.values():
        changes = [ours - theirs for ours, theirs in zip(row["auc"], rows["fp32"]["auc"], strict=True)]
        row["change"] = statistics.mean(changes)
        row["change_error"] = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return rows


def stop_early(
    rows: dict[str, dict[str, Any]],
    seed: int,
    counts: dict[str, Any],
    folder: Path,
    segregated: dict[str, Any],
) -> None:
    """Keep, of the numbers of epochs of a seed, the one best on validation."""
    best = rows.setdefault("fp32, stopped early", {"auc": [], "val_auc": [], "test_auc": []})
    val, test = counts["val"]["auc"], counts["test"]["auc"]
    if len(best["auc"]) <= seed:
        note(rows, "fp32, stopped early", (val + test) / 2, folder, segregated)
        best["val_auc"].append(val)
        best["test_auc"].append(test)
    elif val > best["val_auc"][seed]:
        best["auc"][seed], best["val_auc"][seed], best["test_auc"][seed] = (val + test) / 2, val, test


def note(rows: dict[str, dict[str, Any]], name: str, auc: float, folder: Path, segregated: dict[str, Any]) -> None:
    """Add a training to the table."""
    row = rows.setdefault(name, {"auc": []})
    row["auc"].append(auc)
    row["file_bytes"] = (folder / "model.safetensors").stat().st_size
    row["table_bytes"] = evaluate.load_model(folder)[1].nbytes
    row["rows"] = segregated["rows"]


def disk_auc(folder: Path, segregated: Artifact, split: str) -> float:
    """AUC of a model on disk."""
    predicted, labels = evaluate.run(folder, segregated=segregated, split=split)
    return measure_quality(labels, predicted).auc


# --- the time of a step --------------------------------------------------------------------------------------


def time_steps(configs: dict[str, PipelineConfig], segregated: Artifact, *, steps: int) -> dict[str, float]:
    """Median seconds of a step of each contender."""
    shards = [*segregated.files("hot/", ".npz"), *segregated.files("cold/", ".npz")]
    samples = concat_samples([read_shard(path) for path in shards])
    made = {name: make_step(config, segregated) for name, config in configs.items()}
    timed: dict[str, list[float]] = {name: [] for name in configs}
    size = min(configs["fp32"].train.batch_size, len(samples))
    rng = np.random.default_rng(0)
    for number in range(steps + steps // 2):
        picked = samples.take(rng.choice(len(samples), size, replace=False))
        for name, (step, layout) in made.items():
            batch = stage(layout.translate(picked), layout)
            started = time.perf_counter()
            step(batch, configs[name].train.lr)
            if number >= steps // 2:
                timed[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in timed.items()}


def make_step(config: PipelineConfig, segregated: Artifact) -> tuple[TrainStep, SlotLayout]:
    """Give a step over rows that are all on the device."""
    counts = segregated.counts
    specs = choose_tables(config.tables, counts["tables"], {})
    slot_maps = read_slot_maps(segregated)
    layout = SlotLayout(
        slot_maps,
        num_hot=counts["hot_rows"],
        table_of_column=range(len(slot_maps)),
        tierless={spec.name for spec in specs if spec.representation == "tt"},
    )
    parts = assemble(
        pick(Settings, dataclasses.replace(config.train, mode="resident")),
        layout=layout,
        specs=specs,
        padding_rows={},
        counts=np.zeros(layout.num_slots, np.int64),
        network=config.model,
        linear_bits=config.tables.quantize_linears,
        num_dense=counts["num_dense"],
        seed=0,
        device=torch.device("cpu"),
    )
    return parts.step, layout


def stage(samples: Any, layout: SlotLayout) -> StagedBatch:
    """Give a batch whose positions are its slots."""
    lookups = sort_lookups(samples.X_cat[:, layout.columns].ravel())
    tierless = np.delete(samples.X_cat, layout.columns, axis=1).astype(np.int64)
    return StagedBatch(
        dense=torch.from_numpy(samples.X_int),
        labels=torch.from_numpy(samples.y),
        distinct=Distinct(
            *map(
                torch.from_numpy,
                (lookups.unique.astype(np.int64), lookups.inverse, lookups.order, lookups.starts),
            )
        ),
        is_hot=True,
        tierless=None if layout.is_whole else torch.from_numpy(tierless),
    )


def show(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, {options.seeds} seeds")
    print(
        f"{'tables':<22}{'table bytes':>13}{'of fp32':>9}{'model file':>12}{'of fp32':>9}"
        f"{'step ms':>9}{'of fp32':>9}{'AUC':>9}{'change':>10}{'(se)':>8}"
    )
    first = rows["fp32"]
    for name, row in rows.items():
        step = f"{row['step_ms']:9.2f}{row['step_ratio']:9.2f}" if "step_ms" in row else f"{'':18}"
        print(
            f"{name:<22}{row['table_bytes']:>13,}{row['table_bytes'] / first['table_bytes']:>9.3f}"
            f"{row['file_bytes']:>12,}{row['file_bytes'] / first['file_bytes']:>9.3f}{step}"
            f"{statistics.mean(row['auc']):>9.4f}{row['change']:>+10.4f}{row['change_error']:>8.4f}"
        )
    print(json.dumps({"benchmark": "tables", "pipeline": str(options.pipeline), "seeds": options.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
