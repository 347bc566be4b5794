"""Memory of every stage at two sizes of one log, and what a third would take.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --samples 1000000,2000000 --ahead 45000000

Lines of source `synthetic` through generate, preprocess, profile, segregate and train, each stage in a process of its
own, at two sizes of one vocabulary (`preprocess.max_rows`); the network is small, so that samples are what memory goes
to. Shown is the most that the process ever held, less its tables for train (rows and optimizer state). A line through
both sizes gives the third: on paper, and too much where something is bounded that is not full yet at the smaller size.

Memory of a process hardly depends on what else a machine does; the times do, and are shown to say how long it took.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

from processes import run_apart, timed

STAGES = ("generate", "preprocess", "profile", "segregate", "train")


def main() -> None:
    """Run every stage at every size and print the table, then one JSON line."""
    args = parse_arguments()
    if args.contender:
        stage, samples = args.contender.split("@")
        print(json.dumps(run_stage(stage, int(samples), args.max_rows, args.sets, Path(args.folder))))
        return
    sizes = [int(size) for size in args.samples.split(",")]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for size in sizes:
            for stage in STAGES:
                options = ["--folder", folder, "--max-rows", str(args.max_rows)]
                options += [part for one in args.sets for part in ("--set", one)]
                results[f"{stage}@{size}"] = run_apart(__file__, f"{stage}@{size}", options)
    print_table(results, sizes, args.ahead)
    print(json.dumps({"benchmark": "memory", "arguments": vars(args), "results": results}))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="2000000,10000000", help="two sizes of the log")
    parser.add_argument("--ahead", type=int, default=45_000_000, help="size to say on paper")
    parser.add_argument("--max-rows", type=int, default=20_000, help="rows of a table at most")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="of the pipeline")
    parser.add_argument("--work", help="folder for scratch files")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(stage: str, samples: int, max_rows: int, sets: list[str], folder: Path) -> dict[str, Any]:
    """Run one stage, whose inputs are there."""
    from slipstream.config import load_pipeline
    from slipstream.pipeline import run_pipeline
    from slipstream.shipped import find_pipeline
    from slipstream.stage import trained_row_bytes

    config = load_pipeline(
        find_pipeline("tiny"),
        [
            f"name=lines-{samples}",
            f"dataset.num_samples={samples}",
            f"preprocess.max_rows={max_rows}",
            "model.bottom_mlp=[16]",
            "model.top_mlp=[16, 1]",
            "train.batch_size=2048",
            "train.average=0.0",
            *sets,
        ],
    )

    def work() -> int:
        run_pipeline(config, folder, stages=[stage])
        return samples

    measured = timed(work, unit="samples")
    if stage == "train":
        manifest = max((folder / config.name / "segregate").glob("*/manifest.json"))
        num_rows = json.loads(manifest.read_text())["counts"]["rows"]
        measured["tables_mb"] = num_rows * trained_row_bytes(config) / 2**20
    return measured


def print_table(results: dict[str, dict[str, Any]], sizes: list[int], ahead: int) -> None:
    """Print megabytes by stage and size."""
    print(f"{platform.machine()}, peak MiB of the process, tables of train left out")
    print(f"{'stage':<11}" + "".join(f"{size:>12,}" for size in sizes) + f"{'ratio':>8}{ahead:>14,}")
    small, large = sizes[0], sizes[-1]
    for stage in STAGES:
        found = [results[f"{stage}@{size}"] for size in sizes]
        beside = [one["peak_mb"] - one.get("tables_mb", 0.0) for one in found]
        slope = (beside[-1] - beside[0]) / (large - small)
        row = "".join(f"{size:>12,.0f}" for size in beside)
        print(f"{stage:<11}{row}{beside[-1] / beside[0]:>8.2f}{beside[-1] + slope * (ahead - large):>14,.0f}")


if __name__ == "__main__":
    main()
