"""Quality beside rivals on the same lines: slipstream, LightGBM, a DeepFM of DeepCTR-Torch, and DLRM's own loop.

    pip install 'slipstream[rivals]'
    python benchmarks/bench_quality.py --pipeline criteo_kaggle --raw train.txt
    python benchmarks/bench_quality.py --pipeline avazu --raw train.csv

Every contender trains on the training split of one preprocess, on one thread, in a process of its own, once for each
seed; validation may stop it early, and test is looked at once, afterwards.

    slipstream   the shipped pipeline as it stands, with every row on the device and nothing skipped
    mean of all  the mean of the probabilities of slipstream's seeds, what `slipstream score` gives of several models
    lightgbm     numbers as they are (missing ones missing), and for every id its past-only count and click rate, as
                 `preprocess.count_features` and `target_features` make them; stops after 50 rounds without gain on
                 validation
    deepctr      DeepFM of DeepCTR-Torch with its own optimizer, regularisation and loop; numbers as slipstream has them
    dlrm         DLRM as published for Criteo Kaggle, in plain PyTorch: EmbeddingBag, batches of 128, numbers as it has
                 them, log(x + 1); Adagrad at .01, which its script has too, since SGD at .1 gets nowhere on a small log

Rivals that are not installed are left out by name. FuxiCTR is none of them: its package on PyPI has no models, these
stand in its repository. What it does not show: rivals tuned for the data (each has one setting), and other sizes.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import polars as pl
from processes import run_apart

SPLITS = ("train", "val", "test")
NEEDS = {"lightgbm": "lightgbm", "deepctr": "deepctr_torch"}
PLAIN_DLRM = {
    "preprocess.dense_transform": "dlrm",
    "preprocess.missing_flags": False,
    "preprocess.count_features": [],
    "preprocess.target_features": [],
}
FOR_TREES = {
    "preprocess.dense_transform": "none",
    "preprocess.missing_flags": True,
    "preprocess.count_features": ["all"],
    "preprocess.target_features": ["all"],
}


def main() -> None:
    """Run every contender with every seed and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        contender, seed = args.contender.rsplit(":", 1)
        print(json.dumps(CONTENDERS[contender](Path(args.work), args, int(seed))))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        if not args.raw:
            args.raw = str(write_small_log(Path(folder), args.rows))
        results = {name: run_seeds(name, folder, args) for name in CONTENDERS if name in args.contenders.split(",")}
        if "slipstream" in results:
            own = results.pop("slipstream")
            results = {"slipstream": own, "mean of all": [average(own, folder)]} | results
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<12} {'test AUC':<16} {'logloss':<16} {'calibration':<22} {'val AUC':<9}{'logloss':<9} processor s")
    for name, runs in results.items():
        print(describe(name, runs))
    print(json.dumps({"benchmark": "quality", "arguments": vars(args), "results": results}))


def parse_arguments() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="criteo_kaggle", help="shipped pipeline, or a file")
    parser.add_argument("--raw", default="", help="raw log; left out, a generated one of --rows lines")
    parser.add_argument("--rows", type=int, default=20_000, help="of the generated log")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override keys for slipstream")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--work", default=None, help="folder for temporary files")
    parser.add_argument("--contender", help="run this one here with a seed, `name:0`, and print JSON")
    return parser.parse_args()


def write_small_log(folder: Path, rows: int) -> Path:
    """Write a generated log in Criteo's format, for runs that only show that all of it works."""
    from slipstream.datasets.synthetic import SyntheticSpec, write_log

    write_log(SyntheticSpec(num_samples=rows, num_days=7, seed=0), folder / "log.tsv")
    return folder / "log.tsv"


def run_seeds(name: str, folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one contender with every seed; empty where it is not installed."""
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        print(f"{name} is left out: package `{NEEDS[name]}` is not installed")
        return []
    options = ["--pipeline", args.pipeline, "--raw", args.raw, "--work", folder]
    options += [part for override in args.set for part in ("--set", override)]
    return [run_apart(__file__, f"{name}:{seed}", options) for seed in range(args.seeds)]


def describe(name: str, runs: list[dict[str, Any]]) -> str:
    """Give one line of the table: means over seeds, with standard errors in units of the last digit."""
    if not runs:
        return f"{name:<12} not installed"

    def over_seeds(split: str, figure: str, digits: int = 4) -> str:
        values = [run[split][figure] for run in runs]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{mean(values):.{digits}f} ± {error * 10**digits:.0f}"

    calibrations = [run["test"]["calibration"] for run in runs]
    spread = f"{mean(calibrations):.3f} ({min(calibrations):.3f} to {max(calibrations):.3f})"
    val = [mean(run["val"][figure] for run in runs) for figure in ("auc", "logloss")]
    return (
        f"{name:<12} {over_seeds('test', 'auc'):<16} {over_seeds('test', 'logloss'):<16} {spread:<22} "
        f"{val[0]:<9.4f}{val[1]:<9.4f} {mean(run['cpu_seconds'] for run in runs):.1f}"
    )


# --- what contenders share -----------------------------------------------------------------------------------


def load_split(processed: Path, split: str) -> pl.DataFrame:
    """Every encoded sample of a split."""
    return pl.concat([pl.read_parquet(part) for part in sorted((processed / split).glob("part-*.parquet"))])


def preprocess(work: Path, args: argparse.Namespace, changes: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Preprocess the log with some keys changed; returns the folder and its figures."""
    from slipstream.config import load_pipeline
    from slipstream.pipeline import run_pipeline
    from slipstream.shipped import find_pipeline

    overrides = [*args.set, f"dataset.raw={json.dumps(args.raw)}"]
    overrides += [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    config = load_pipeline(find_pipeline(args.pipeline), overrides)
    artifact = run_pipeline(config, work / "runs", stages=["preprocess"]).stages["preprocess"].artifact
    return artifact.path, artifact.counts


def judge(name: str, seed: int, work: Path, frames: dict[str, pl.DataFrame], predicted: dict[str, Any], cpu: float):
    """Measure everybody's predictions alike."""
    from slipstream.ops.metrics import measure_quality

    found: dict[str, Any] = {"cpu_seconds": cpu}
    for split in ("val", "test"):
        labels = frames[split]["label"].to_numpy().astype(np.float32)
        probabilities = np.asarray(predicted[split], np.float32).reshape(-1)
        found[split] = asdict(measure_quality(labels, probabilities))
        np.save(work / f"{name}-{seed}-{split}.npy", np.stack([labels, probabilities]))
    return found


def average(runs: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Measure the mean of the probabilities that the seeds of slipstream predicted; it takes the time of all."""
    from slipstream.ops.metrics import measure_quality

    found: dict[str, Any] = {"cpu_seconds": sum(run["cpu_seconds"] for run in runs)}
    for split in ("val", "test"):
        seeds = [np.load(path) for path in sorted(Path(folder).glob(f"slipstream-*-{split}.npy"))]
        found[split] = asdict(measure_quality(seeds[0][0], np.mean([one[1] for one in seeds], axis=0)))
    return found


# --- contenders ----------------------------------------------------------------------------------------------


def run_slipstream(work: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train the pipeline with every row on the device; time is that of training, packages loaded."""
    import slipstream

    overrides = [*args.set, f"dataset.raw={json.dumps(args.raw)}", "train.mode=resident", "train.num_threads=1"]
    result = slipstream.run(args.pipeline, [*overrides, f"train.seed={seed}"], runs=work / "runs")
    frames = {split: load_split(result.paths["preprocess"], split) for split in ("val", "test")}
    predicted = {split: result.predictions(split)["probability"].to_numpy() for split in ("val", "test")}
    return judge("slipstream", seed, work, frames, predicted, result.figures["train"]["cpu_seconds"])


def run_lightgbm(work: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Boost trees on numbers, counts and click rates of the past."""
    import lightgbm

    processed, figures = preprocess(work, args, FOR_TREES)
    frames = {split: load_split(processed, split) for split in SPLITS}
    flagged = figures.get("flagged_columns") or []
    num_added = len(flagged) + len(figures["past"]["count_columns"]) + len(figures["past"]["target_columns"])
    num_own = figures["num_dense"] - num_added

    def columns(frame: pl.DataFrame) -> np.ndarray:
        values = frame.select(f"int_{at}" for at in range(figures["num_dense"])).to_numpy().astype(np.float32)
        for place, column in enumerate(flagged, start=num_own):
            values[values[:, place] == 1, column] = np.nan
        return values

    inputs, labels = ({split: of(frame) for split, frame in frames.items()} for of in (columns, lambda f: f["label"]))
    options = {
        "objective": "binary",
        "learning_rate": 0.05,
        "num_leaves": 63,
        "min_data_in_leaf": 100,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "num_threads": 1,
        "seed": seed,
        "verbose": -1,
    }
    started = time.process_time()
    train = lightgbm.Dataset(inputs["train"], labels["train"].to_numpy())
    booster = lightgbm.train(
        options,
        train,
        num_boost_round=1000,
        valid_sets=[lightgbm.Dataset(inputs["val"], labels["val"].to_numpy(), reference=train)],
        callbacks=[lightgbm.early_stopping(50, verbose=False)],
    )
    cpu = time.process_time() - started
    return judge("lightgbm", seed, work, frames, {split: booster.predict(inputs[split]) for split in SPLITS}, cpu)


def run_deepctr(work: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train DeepCTR-Torch's DeepFM: rows of 16, layers of 256 and 128, Adam, one epoch in batches of 256."""
    import torch
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    torch.set_num_threads(1)
    processed, figures = preprocess(work, args, {"preprocess.dense_transform": "standard"})
    frames = {split: load_split(processed, split) for split in SPLITS}
    dense = [f"int_{at}" for at in range(figures["num_dense"])]
    sizes = figures["rows_per_table"]
    features = [SparseFeat(name, rows, embedding_dim=16) for name, rows in sizes.items()]
    features += [DenseFeat(name, 1) for name in dense]
    inputs = {
        split: {name: frame[name].to_numpy(writable=True) for name in [*sizes, *dense]}
        for split, frame in frames.items()
    }
    started = time.process_time()
    model = DeepFM(features, features, dnn_hidden_units=(256, 128), seed=seed, device="cpu")
    model.compile("adam", "binary_crossentropy")
    labels = frames["train"]["label"].to_numpy().astype(np.float32)
    model.fit(inputs["train"], labels, batch_size=256, epochs=1, verbose=0)
    cpu = time.process_time() - started
    predicted = {split: model.predict(inputs[split], batch_size=16_384) for split in ("val", "test")}
    return judge("deepctr", seed, work, frames, predicted, cpu)


def run_dlrm(work: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train DLRM as its authors do: the network in plain PyTorch, Adagrad, one pass over shuffled samples."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    processed, figures = preprocess(work, args, PLAIN_DLRM)
    frames = {split: load_split(processed, split) for split in SPLITS}
    dense_names, sizes = [f"int_{at}" for at in range(figures["num_dense"])], figures["rows_per_table"]
    dense, rows, labels = (
        {split: torch.from_numpy(of(frame)) for split, frame in frames.items()}
        for of in (
            lambda frame: frame.select(dense_names).to_numpy().astype(np.float32),
            lambda frame: frame.select(list(sizes)).to_numpy().astype(np.int64),
            lambda frame: frame["label"].to_numpy().astype(np.float32),
        )
    )

    def layers(*widths: int) -> list[nn.Module]:
        made: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            linear = nn.Linear(width_in, width_out)
            nn.init.normal_(linear.weight, std=(2 / (width_in + width_out)) ** 0.5)
            nn.init.normal_(linear.bias, std=(1 / width_out) ** 0.5)
            made += [linear, nn.ReLU()]
        return made

    tables = nn.ModuleList(nn.EmbeddingBag(size, 16, mode="sum", sparse=True) for size in sizes.values())
    for table, size in zip(tables, sizes.values(), strict=True):
        nn.init.uniform_(table.weight, -(size**-0.5), size**-0.5)
    bottom = nn.Sequential(*layers(len(dense_names), 512, 256, 64, 16))
    vectors = len(sizes) + 1
    top = nn.Sequential(*layers(vectors * (vectors - 1) // 2 + 16, 512, 256, 1)[:-1])
    low, high = torch.tril_indices(vectors, vectors, offset=-1)

    def forward(dense: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        first = bottom(dense)
        looked_up = [table(rows[:, at : at + 1]) for at, table in enumerate(tables)]
        stacked = torch.stack([first, *looked_up], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))[:, low, high]
        return top(torch.cat([first, products], dim=1)).squeeze(1)

    optimizer = torch.optim.Adagrad([*bottom.parameters(), *top.parameters(), *tables.parameters()], lr=0.01)
    started = time.process_time()
    for batch in torch.randperm(len(labels["train"])).split(128):
        optimizer.zero_grad()
        logits = forward(dense["train"][batch], rows["train"][batch])
        nn.functional.binary_cross_entropy_with_logits(logits, labels["train"][batch]).backward()
        optimizer.step()
    cpu = time.process_time() - started
    with torch.inference_mode():
        predicted = {split: forward(dense[split], rows[split]).sigmoid().numpy() for split in ("val", "test")}
    return judge("dlrm", seed, work, frames, predicted, cpu)


CONTENDERS: dict[str, Callable[[Path, argparse.Namespace, int], dict[str, Any]]] = {
    "slipstream": run_slipstream,
    "lightgbm": run_lightgbm,
    "deepctr": run_deepctr,
    "dlrm": run_dlrm,
}

if __name__ == "__main__":
    main()
