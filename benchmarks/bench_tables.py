"""How tables are held: bytes, quality and the time of a step, for one pipeline.

    python benchmarks/bench_tables.py         the shipped `tiny`: synthetic data, figures of a toy
    python benchmarks/bench_tables.py --pipeline pipelines/criteo_kaggle.toml --raw train.txt --seeds 3

Contenders: fp32 rows; int8, int4 and int2 trained on their grid; int4 after training, by `export model`; large tables
as tensor-train cores; int4 with int8 layers; with --mixed and --buckets, mixed tables under budgets and raw ids hashed
into so many buckets a table. Every contender sees the same samples, order and seeds. AUC and logloss are means of test
and validation data, their changes paired by seed, with standard errors. Steps are timed on real batches, all rows on
one device, contenders taking turns batch by batch in one process, so that a noisy host disturbs all alike; the ratio is
of medians.

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
from slipstream.io.counts import read_counts
from slipstream.io.figures import SegregateFigures
from slipstream.io.samples import concat_samples, read_shard
from slipstream.ops.metrics import measure_quality
from slipstream.options import pick
from slipstream.pipeline import export_model, run_pipeline
from slipstream.stages import evaluate
from slipstream.training.assemble import Design, Settings, assemble
from slipstream.training.order.shards import read_slot_maps
from slipstream.training.representations import lay_out
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
        "int2": ["tables.representation=int2"],
        "int4 + int8 layers": ["tables.representation=int4", "tables.quantize_linears=8"],
        "tt": [
            f"tables.rules=[{{min_rows = {tt_rows}, representation = 'tt', tt_ranks = [{tt_rank}, {tt_rank}]}}]",
        ],
        **{f"mixed {budget}": mixed(budget) for budget in options.mixed},
        **{f"int8, {buckets} buckets": hashed(buckets) for buckets in options.buckets},
    }
    left_out = {name.strip() for name in options.without.split(",")}
    return {name: overrides for name, overrides in every.items() if name not in left_out}


def mixed(budget: str) -> list[str]:
    """Give overrides for a budget of mixed tables."""
    return ["tables.representation=mixed", f"tables.mixed_budget='{budget}'"]


def hashed(buckets: int) -> list[str]:
    """Give overrides for tables of so many rows, on 8 bits, which cost nothing."""
    return ["tables.representation=int8", f"preprocess.num_buckets={buckets}"]


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
        stages = run_pipeline(configs["fp32"], runs).stages
        # hashed ids have other tables, and steps over fp32 rows
        timed = {name: config for name, config in configs.items() if config.preprocess == configs["fp32"].preprocess}
        seconds = time_steps(timed, stages["segregate"].artifact, stages["profile"].artifact, steps=options.steps)
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
    parser.add_argument("--mixed", nargs="*", default=["5%"], metavar="BUDGET", help="budgets of mixed tables")
    parser.add_argument("--buckets", nargs="*", default=[], type=int, help="buckets that raw ids are hashed into")
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
            note(rows, name, [counts["test"], counts["val"]], trained.path, result.counts("segregate"))
            if name.startswith("fp32") and options.max_epochs > 1:
                stop_early(rows, seed, counts, trained.path, result.counts("segregate"))
            if name == "fp32" and "int4 after training" not in options.without:
                out = scratch / f"packed-{seed}"
                export_model(trained.path, representation="int4", out_dir=out)
                found = [measure_on_disk(out, result.stages["segregate"].artifact, split) for split in ("test", "val")]
                note(rows, "int4 after training", found, out, result.counts("segregate"))
    for row in rows.values():
        for key in ("auc", "logloss"):
            changes = [ours - theirs for ours, theirs in zip(row[key], rows["fp32"][key], strict=True)]
            row[f"{key}_change"] = statistics.mean(changes)
            row[f"{key}_error"] = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    return rows


def stop_early(
    rows: dict[str, dict[str, Any]],
    seed: int,
    counts: dict[str, Any],
    folder: Path,
    segregated: dict[str, Any],
) -> None:
    """Keep, of the numbers of epochs of a seed, the one best on validation."""
    best = rows.setdefault("fp32, stopped early", {})
    measured, val = [counts["test"], counts["val"]], counts["val"]["auc"]
    if len(best.setdefault("val_auc", [])) <= seed:
        note(rows, "fp32, stopped early", measured, folder, segregated)
        best["val_auc"].append(val)
    elif val > best["val_auc"][seed]:
        best["val_auc"][seed] = val
        for key in ("auc", "logloss"):
            best[key][seed] = statistics.mean(split[key] for split in measured)


def note(
    rows: dict[str, dict[str, Any]],
    name: str,
    measured: list[dict[str, Any]],
    folder: Path,
    segregated: dict[str, Any],
) -> None:
    """Add a training, as it was measured on test and on validation data, to the table."""
    row = rows.setdefault(name, {})
    for key in ("auc", "logloss"):
        row.setdefault(key, []).append(statistics.mean(split[key] for split in measured))
    row.setdefault("test", []).append([measured[0]["auc"], measured[0]["logloss"]])
    row["file_bytes"] = (folder / "model.safetensors").stat().st_size
    row["table_bytes"] = evaluate.load_model(folder)[1].nbytes
    row["rows"] = segregated["rows"]


def measure_on_disk(folder: Path, segregated: Artifact, split: str) -> dict[str, Any]:
    """Measure a model on disk."""
    predicted, labels = evaluate.run(folder, segregated=segregated, split=split)
    return dataclasses.asdict(measure_quality(labels, predicted))


# --- the time of a step --------------------------------------------------------------------------------------


def time_steps(
    configs: dict[str, PipelineConfig], segregated: Artifact, profiled: Artifact, *, steps: int
) -> dict[str, float]:
    """Median seconds of a step of each contender."""
    shards = [*segregated.files("hot/", ".npz"), *segregated.files("cold/", ".npz")]
    samples = concat_samples([read_shard(path) for path in shards])
    made = {name: make_step(config, segregated, profiled) for name, config in configs.items()}
    timed: dict[str, list[float]] = {name: [] for name in configs}
    size = min(configs["fp32"].train.batch_size, len(samples))
    rng = np.random.default_rng(0)
    for number in range(steps + steps // 2):
        picked = samples.take(rng.choice(len(samples), size, replace=False))
        for name, (step, layout) in made.items():
            batch = stage(layout.translate(picked), layout, step.representations.range_of_slot)
            started = time.perf_counter()
            step(batch, configs[name].train.lr)
            if number >= steps // 2:
                timed[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in timed.items()}


def make_step(config: PipelineConfig, segregated: Artifact, profiled: Artifact) -> tuple[TrainStep, SlotLayout]:
    """Give a step over rows that are all on the device."""
    figures = SegregateFigures.of(segregated)
    specs = choose_tables(config, figures, read_counts(profiled))
    layout = lay_out(read_slot_maps(segregated), specs, num_hot=figures.hot_rows, table_of_column=figures.column_tables)
    parts = assemble(
        Design(
            settings=pick(Settings, dataclasses.replace(config.train, mode="resident")),
            layout=layout,
            specs=specs,
            padding_rows={},
            counts=np.zeros(layout.num_slots, np.int64),
            network=config.model,
            linear_bits=config.tables.quantize_linears,
            num_dense=figures.num_dense,
        ),
        seed=0,
        device=torch.device("cpu"),
    )
    return parts.step, layout


def stage(samples: Any, layout: SlotLayout, range_of_slot: np.ndarray | None) -> StagedBatch:
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
        ranges=None if range_of_slot is None else torch.from_numpy(range_of_slot[samples.X_cat[:, layout.columns]]),
    )


def show(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, {options.seeds} seeds")
    print(
        f"{'tables':<22}{'table bytes':>13}{'of fp32':>9}{'model file':>12}{'of fp32':>9}"
        f"{'step ms':>9}{'of fp32':>9}{'AUC':>9}{'change':>10}{'(se)':>8}{'logloss':>9}{'change':>10}{'(se)':>8}"
    )
    first = rows["fp32"]
    for name, row in rows.items():
        step = f"{row['step_ms']:9.2f}{row['step_ratio']:9.2f}" if "step_ms" in row else f"{'':18}"
        print(
            f"{name:<22}{row['table_bytes']:>13,}{row['table_bytes'] / first['table_bytes']:>9.3f}"
            f"{row['file_bytes']:>12,}{row['file_bytes'] / first['file_bytes']:>9.3f}{step}"
            f"{statistics.mean(row['auc']):>9.4f}{row['auc_change']:>+10.4f}{row['auc_error']:>8.4f}"
            f"{statistics.mean(row['logloss']):>9.4f}{row['logloss_change']:>+10.4f}{row['logloss_error']:>8.4f}"
        )
    print(json.dumps({"benchmark": "tables", "pipeline": str(options.pipeline), "seeds": options.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
