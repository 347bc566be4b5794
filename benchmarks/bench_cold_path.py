"""Training tables four times as large as the memory it is allowed, through `train.cold_path`.

    python benchmarks/bench_cold_path.py                            # 512 MiB of memory, 2 GiB of rows
    python benchmarks/bench_cold_path.py --memory 8GiB --folder /mnt/nvme

Eight tables of equal size, rows of 64 values with row-wise Adagrad, mode `fae` with 1 % of the rows hot, a small DLRM;
lookups are drawn so that the logarithm of a row's rank is uniform (Zipf with exponent 1): a third of them is cold. The
batches are the same for all contenders, each in a process of its own:

    in memory            nothing is limited
    in a file            nothing is limited: the page cache holds all of it
    in a file, limited   the process with its packages, page cache included, in a control group of so much memory
    in memory, limited   what happens without `train.cold_path`

Shown are samples/s over all steps and over the second half of them, when the page cache holds what it can; major page
faults (waits for the disk) and bytes read from it; the most memory; and whether every row and layer, hashed, ends as in
memory. Limits need a writable control group (version 1 or 2; root in most containers); where there is none, limited
contenders are left out, and the output says so.

What it does not show: a GPU, a disk that does nothing else, a table of terabytes, or how quality depends on anything.

A table for people first, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUM_TABLES, DIM, NUM_DENSE, HOT_SHARE = 8, 64, 4, 0.01
ROW_BYTES = 4 * (DIM + 1)
CONTENDERS = ("in memory", "in a file", "in a file, limited", "in memory, limited")
_CGROUP = "SLIPSTREAM_BENCH_CGROUP"
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.contender:
        print(json.dumps(train(options)))
        return
    measured = {label: run_apart(label, None) for label in CONTENDERS if not label.endswith("limited")}
    for label in CONTENDERS[len(measured) :]:
        with control_group(options.memory) as group:
            if group is not None:
                measured[label] = run_apart(label, group)
    show(options, measured)


def parse() -> argparse.Namespace:
    """Read the command line."""
    from slipstream.options import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=parse_bytes, default="512MiB", help="allowed to limited contenders")
    parser.add_argument(
        "--table", type=parse_bytes, help="of all rows with their state; four times --memory by default"
    )
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--folder", help="for the file of cold rows; a temporary one beside others by default")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.table = options.table or 4 * options.memory
    return options


@contextmanager
def control_group(memory: int) -> Iterator[Path | None]:
    """Make a control group with so much memory; None where nobody may."""
    name = f"slipstream-bench-{os.getpid()}"
    is_v2 = (_V2 / "cgroup.controllers").exists()
    group, limit = (_V2 / name, "memory.max") if is_v2 else (_V1 / name, "memory.limit_in_bytes")
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        (group / limit).write_text(str(memory))
        for swap in ("memory.swap.max", "memory.swappiness"):
            if (group / swap).exists():
                (group / swap).write_text("0")
        yield group
    except OSError:  # a group, but without a controller for memory
        yield None
    finally:
        group.rmdir()


def run_apart(label: str, group: Path | None) -> dict[str, Any]:
    """Run a contender in a process of its own, in a control group; what it prints last, or that it was killed."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if group is not None:
        environment[_CGROUP] = str(group)
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", label]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if group is not None and answer.returncode == -signal.SIGKILL:
        return {"killed": True}
    if answer.returncode:
        raise SystemExit(f"{label} failed:\n{answer.stderr}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, and say how it went."""
    group = os.environ.get(_CGROUP)
    if group is not None:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from slipstream.config import build_pipeline
    from slipstream.wiring import make_trainer

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = build_pipeline(
            {
                "name": "cold_path",
                "dataset": {"source": "synthetic"},
                "model": {"embedding_dim": DIM, "bottom_mlp": [DIM], "top_mlp": [16, 1]},
                "train": {
                    "mode": "fae",
                    "device": "cpu",
                    "batch_size": options.batch,
                    "chunk_batches": 8,
                    "cold_path": folder if options.contender.startswith("in a file") else "",
                },
            }
        )
        torch.set_num_threads(1)
        began = time.perf_counter()
        parts, slot_maps = put_together(config, options.table // ROW_BYTES // NUM_TABLES)
        made = time.perf_counter()
        trainer = make_trainer(config, parts, num_train=options.steps * options.batch)
        before, half = counters(), options.steps // 2
        batches = draw_batches(slot_maps, options)
        seconds = [timed_steps(trainer, batches, half), timed_steps(trainer, batches, options.steps - half)]
        trainer.lookahead.flush()
        after = counters()
        result = {
            "samples_per_second": options.steps * options.batch / sum(seconds),
            "second_half": (options.steps - half) * options.batch / seconds[1],
            "making_seconds": made - began,
            "cold_lookups": trainer.lookahead.cold_lookups / trainer.lookahead.lookups,
            "fetched_rows": trainer.lookahead.bytes_to_device // ROW_BYTES,
            **{name: after[name] - before[name] for name in after},
            "digest": digest(parts),
            "most_bytes": most_memory(group),
        }
        parts.rows.close()
        return result


def put_together(config: Any, rows_per_table: int) -> tuple[Any, Any]:
    """Give (what trains, slots of each table): the first rows of every table are hot."""
    import numpy as np
    import torch

    from slipstream.io.figures import TableFigures
    from slipstream.training.slot_layout import SlotLayout
    from slipstream.wiring import choose_tables
    from slipstream.wiring import put_together as put

    num_hot = max(1, int(rows_per_table * HOT_SHARE))
    sizes = {f"cat_{at}": rows_per_table for at in range(NUM_TABLES)}
    slot_maps = {}
    for at, name in enumerate(sizes):
        # hot slots of all tables come first, then their cold ones, table by table
        slots = np.arange(rows_per_table, dtype=np.int32)
        slots[:num_hot] += at * num_hot
        slots[num_hot:] += NUM_TABLES * num_hot + at * (rows_per_table - num_hot) - num_hot
        slot_maps[name] = slots
    figures = TableFigures(num_dense=NUM_DENSE, rows_per_table=sizes, table_of_column=list(range(NUM_TABLES)))
    layout = SlotLayout(slot_maps, num_hot=NUM_TABLES * num_hot, table_of_column=range(NUM_TABLES))
    specs = choose_tables(config.tables, sizes, {})
    counts = np.empty(0, np.int64)  # only a cache asks for them
    device = torch.device("cpu")
    parts = put(config, layout=layout, specs=specs, figures=figures, counts=counts, device=device)
    return parts, list(slot_maps.values())


def draw_batches(slot_maps: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Batches, the same in every process."""
    import numpy as np

    from slipstream.embedding.tiers.lookahead import Batch

    rng = np.random.default_rng(0)
    size = len(slot_maps[0])
    for _ in range(options.steps):
        rows = np.minimum(size ** rng.random((options.batch, NUM_TABLES)), size - 1).astype(np.int64)
        yield Batch(
            dense=rng.random((options.batch, NUM_DENSE), np.float32),
            slots=np.stack([slots[rows[:, at]] for at, slots in enumerate(slot_maps)], axis=1),
            labels=(rng.random(options.batch) < 0.3).astype(np.float32),
            is_hot=False,
        )


def timed_steps(trainer: Any, batches: Iterator[Any], count: int) -> float:
    """Train on so many batches; seconds."""
    from itertools import islice

    began = time.perf_counter()
    trainer.lookahead.run(islice(batches, count), lambda batch: trainer.step(batch, 0.02))
    return time.perf_counter() - began


def counters() -> dict[str, int]:
    """Count waits of this process for a disk, and bytes it read from there."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return {
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "read_bytes": int(fields["read_bytes"]),
    }


def digest(parts: Any) -> str:
    """Hash every row and every layer."""
    import torch
    import xxhash

    found = xxhash.xxh3_64()
    for slots in parts.layout.slot_maps.values():
        for part in torch.from_numpy(slots).split(1 << 16):
            found.update(parts.rows.gather(part).numpy())
    for parameter in parts.model.parameters():
        found.update(parameter.detach().numpy())
    return found.hexdigest()


def most_memory(group: str | None) -> int:
    """Most bytes that the control group held, page cache included; without one, those of this process."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if group is not None and Path(group, name).exists():
            return int(Path(group, name).read_text(encoding="ascii"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(options: argparse.Namespace, measured: dict[str, dict[str, Any]]) -> None:
    """Print the table, and the line for machines."""
    rows = options.table // ROW_BYTES
    print(
        f"{rows:,} rows of {ROW_BYTES} bytes: {options.table / 2**30:.2f} GiB, "
        f"{options.table / options.memory:.1f} times the {options.memory / 2**30:.2f} GiB allowed; "
        f"{options.steps} batches of {options.batch:,}; load {os.getloadavg()[0]:.1f}"
    )
    if len(measured) < len(CONTENDERS):
        print("no control group may be made here, so nothing was limited; try as root, or under systemd-run --scope")
    columns = ("samples/s", "second half", "major faults", "MiB read", "most MiB", "making s", "result")
    print(f"{'':<20}" + "".join(f"{name:>14}" for name in columns))
    for label, one in measured.items():
        if one.get("killed"):
            print(f"{label:<20}{'killed by the kernel: out of memory':>{14 * len(columns)}}")
            continue
        one["is_equal"] = one["digest"] == measured["in memory"]["digest"]
        values = (
            f"{one['samples_per_second']:,.0f}",
            f"{one['second_half']:,.0f}",
            f"{one['major_faults']:,}",
            f"{one['read_bytes'] / 2**20:,.0f}",
            f"{one['most_bytes'] / 2**20:,.0f}",
            f"{one['making_seconds']:,.1f}",
            "equal" if one["is_equal"] else "DIFFERENT",
        )
        print(f"{label:<20}" + "".join(f"{value:>14}" for value in values))
    print(json.dumps({"benchmark": "cold_path", "table": options.table, "memory": options.memory, "results": measured}))


if __name__ == "__main__":
    main()
