"""Training throughput of every mode, beside a plain PyTorch loop and the same step without embeddings.

    python benchmarks/bench_train.py                                   # Kaggle's network on this machine
    python benchmarks/bench_train.py --config cached-embedding         # CachedEmbedding's configuration
    python benchmarks/bench_train.py --rows 20000 --steps 4 --batch 64 --rounds 1   # toy size

    python benchmarks/bench_train.py --device cuda                     # all of it on a GPU: full Kaggle sizes, tf32

Each contender has a process of its own, alone on the machine, so that its tables are gone when the next one begins; it
warms up with one pass over the samples and times a few more. Rounds repeat that; shown are medians over the rounds,
ratios being taken within each round. Samples come through the real input path: shuffled windows, batches, look-ahead;
from memory, except for `input`, which reads shards from disk and does nothing else, so that it shows what a step can be
fed with.

    plain, plain-host      a loop with nn.EmbeddingBag, its tables on the device or on the host
    fae, slipstream, baseline, cached    rows brought by the look-ahead
    in-place S             rows read by the device itself, a share S of them hot; on a CPU only a model of that
    host-look-ahead S      what the host does for a GPU at that share of hot rows, and no step: batches, cold rows
    host-in-place S        found, gathered and written back; or, in place, batches packed for one copy; or windows of
    host-windows S         samples brought in bulk, and their order. Its core-ms a step are what a GPU asks of the host,
                           its steps/s the most it can be kept busy with

`floor` is the least time that memory traffic and FLOP of a step allow, on devices whose rates are known here. What the
figures do not show: quality, which exact modes share to the bit (tests) and skipping changes (`slipstream compare`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import peak_mb, run_apart
from torch import nn

from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.batch_plan import BatchPlan
from slipstream.embedding.tiers.in_place import InPlace, Runner
from slipstream.embedding.tiers.lookahead import LookAhead, StagedBatch
from slipstream.embedding.tiers.mapped import map_to_device
from slipstream.embedding.tiers.placement import CachedRows, Placement, StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.io.samples import Samples, read_shard, write_shard
from slipstream.models.dlrm import DLRM
from slipstream.ops.hot_set import assign_slots, rank_rows, table_offsets, take_hot_rows
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.loop import Trainer
from slipstream.training.order.batches import BatchMaker
from slipstream.training.order.rounds import Position
from slipstream.training.order.schedule import Schedule
from slipstream.training.order.stream import SampleStream
from slipstream.training.representations import Representations
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.skipper import Skipper
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep
from slipstream.training.threads import step_flop

KAGGLE_SIZES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]  # fmt: skip
CONFIGS = {
    "kaggle": {"dim": 16, "bottom": [512, 256, 64, 16], "top": [512, 256, 1], "batch": 2048},
    "cached-embedding": {"dim": 128, "bottom": [512, 256, 128], "top": [1024, 1024, 512, 256, 1], "batch": 16384},
}
CONTENDERS = [
    "input", "ceiling", "plain", "torchrec", "resident", "baseline",
    "fae 0.001", "fae 0.01", "fae 0.1", "cached 0.001", "cached 0.01", "cached 0.1",
    "slipstream 0.001", "slipstream 0.01", "slipstream 0.1",
    "host-look-ahead 0.01", "host-in-place 0.01", "host-windows 0.01",
]  # fmt: skip
CUDA_CONTENDERS = [
    "input", "ceiling", "plain", "plain-host", "resident", "baseline", "in-place 0",
    "fae 0.001", "fae 0.01", "fae 0.1", "in-place 0.001", "in-place 0.01", "in-place 0.1", "in-place 1",
    "cached 0.01", "host-look-ahead 0.01", "host-in-place 0.01", "host-windows 0.01",
]  # fmt: skip
NUM_DENSE = 13
RATES = {"H100": (3.35e12, 495e12, 64e9), "H200": (4.8e12, 495e12, 64e9)}
"""Bytes/s of memory, FLOP/s of tf32 products without sparsity, bytes/s of the bus each way, as NVIDIA has them."""
ON_DEVICE = {"input", "ceiling", "plain", "plain-host", "torchrec", "resident"}
"""Contenders that know no hot rows."""
ON_HOST = {"host-look-ahead", "host-in-place", "host-windows"}
"""Contenders that do what the host does for a GPU, and no step."""
NUM_LOADERS = 8
SAMPLES_PER_SHARD = 1 << 16
Pass = Callable[[], dict[str, float]]
"""Trains over all samples once and says how that went."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One contender's data and network."""

    name: str
    share: float
    samples: Samples
    num_rows: int
    num_hot: int
    counts: np.ndarray
    table_of: list[slice]
    args: argparse.Namespace


def make_case(contender: str, args: argparse.Namespace) -> Case:
    """Draw Zipf lookups over tables of Criteo Kaggle's sizes and give rows their slots."""
    name, _, share = contender.partition(" ")
    rng = np.random.default_rng(0)
    shrink = args.rows / sum(KAGGLE_SIZES)
    sizes = [max(3, round(size * shrink)) for size in KAGGLE_SIZES]
    offsets = table_offsets(sizes)
    num_samples = args.steps * args.batch
    rows = np.empty((num_samples, len(sizes)), np.int64)
    for table, size in enumerate(sizes):
        weights = np.arange(1, size + 1, dtype=np.float64) ** -args.zipf
        ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(num_samples))
        rows[:, table] = np.minimum(ranks, size - 1) + offsets[table]
    counts = np.bincount(rows.ravel(), minlength=offsets[-1])
    num_hot = offsets[-1] if name in ON_DEVICE else max(len(sizes), int(offsets[-1] * float(share or 0)))
    chosen = take_hot_rows(rank_rows(counts, offsets[:-1]), counts, num_rows=int(num_hot), num_always=len(sizes))
    is_hot = chosen.is_hot if num_hot < offsets[-1] else np.ones(offsets[-1], bool)
    slots = assign_slots(is_hot)
    by_slot = np.empty_like(counts)
    by_slot[slots] = counts
    uses_rows = name in ("plain", "plain-host", "torchrec")
    samples = Samples(
        X_int=rng.random((num_samples, NUM_DENSE), np.float32),
        X_cat=(rows - offsets[:-1]).astype(np.int32) if uses_rows else slots[rows],
        y=(rng.random(num_samples) < 0.25).astype(np.float32),
    )
    return Case(
        name=name,
        share=float(share or 0),
        samples=samples,
        num_rows=int(offsets[-1]),
        num_hot=int(is_hot.sum()),
        counts=by_slot,
        table_of=[slice(int(a), int(b)) for a, b in pairwise(offsets)],
        args=args,
    )


def make_model(case: Case, device: torch.device) -> torch.nn.Module:
    """Give the network of the configuration."""
    torch.manual_seed(0)
    config = CONFIGS[case.args.config]
    model = DLRM(embedding_dim=config["dim"], bottom_mlp=config["bottom"], top_mlp=config["top"])
    return model.build(num_dense=NUM_DENSE, num_columns=len(case.table_of)).to(device)


def split_samples(case: Case) -> dict[str, Samples]:
    """Hot and cold samples, as segregate leaves them."""
    if case.name in (*ON_DEVICE, "cached", "baseline"):
        is_hot = np.zeros(len(case.samples), bool)
    else:
        is_hot = (case.samples.X_cat < case.num_hot).all(axis=1)
    return {"hot": case.samples.take(is_hot), "cold": case.samples.take(~is_hot)}


def open_streams(groups: dict[str, Samples], pool: ThreadPoolExecutor) -> dict[str, SampleStream]:
    """Hot and cold samples of an epoch."""
    return {
        name: SampleStream([lambda group=group: group], [len(group)], seed=(0,), window_samples=1 << 21, workers=pool)
        for name, group in groups.items()
    }


def keep_shards(case: Case) -> tuple[tempfile.TemporaryDirectory[str], list[int]]:
    """All samples as shards on disk."""
    folder = tempfile.TemporaryDirectory()
    starts = range(0, len(case.samples), SAMPLES_PER_SHARD)
    pieces = [case.samples.take(slice(start, start + SAMPLES_PER_SHARD)) for start in starts]
    for number, piece in enumerate(pieces):
        write_shard(Path(folder.name) / f"{number}.npz", piece)
    return folder, [len(piece) for piece in pieces]


def open_shards(
    shards: tuple[tempfile.TemporaryDirectory[str], list[int]], pool: ThreadPoolExecutor
) -> dict[str, SampleStream]:
    """All samples, read from disk again."""
    folder, sizes = shards
    paths = [Path(folder.name) / f"{number}.npz" for number in range(len(sizes))]
    loaders = [partial(read_shard, path) for path in paths]
    streams = {"hot": ([], []), "cold": (loaders, sizes)}
    return {
        name: SampleStream(*given, seed=(0,), window_samples=1 << 18, workers=pool) for name, given in streams.items()
    }


class NoPlan(BatchPlan):
    """What a host that has a GPU does of a plan: nothing."""

    def find(self, before: BatchPlan) -> None:
        """Leave it to the device."""

    def fetch(self) -> None:
        """Likewise."""


class PackedBatches(RowMover):
    """Batches packed for one copy, as they are for a GPU, into memory that is used again."""

    def __init__(self, rows: TieredRows) -> None:
        super().__init__(rows)
        self._packed = [torch.zeros(0, dtype=torch.uint8) for _ in range(4)]
        self._turn = 0

    def to_device(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Pack arrays one behind the other."""
        self._turn = (self._turn + 1) % len(self._packed)
        flat = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        total = sum(tensor.nbytes for tensor in flat)
        if len(self._packed[self._turn]) < total:
            self._packed[self._turn] = torch.zeros(total, dtype=torch.uint8)
        pieces = self._packed[self._turn][:total].split([tensor.nbytes for tensor in flat])
        for piece, tensor in zip(pieces, flat, strict=True):
            piece.copy_(tensor.view(-1).view(torch.uint8))
        return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, flat, strict=True)]


class NoStep(TrainStep):
    """No step at all."""

    def _compute(self, batch: StagedBatch) -> None:
        pass


class WithoutEmbeddings:
    """Makes of a step one without gather and sparse update."""

    model: nn.Module
    rows: TieredRows
    dense_optimizer: DenseOptimizer
    _lr: torch.Tensor
    _num_steps: torch.Tensor
    _loss_sum: torch.Tensor

    def _compute(self, batch: StagedBatch) -> None:
        width = self.rows.embedding_dim
        constant = torch.zeros(len(batch), batch.num_lookups() // len(batch), width, device=batch.dense.device)
        logits = self.model(batch.dense, constant)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        self.dense_optimizer.zero_grad()
        loss.backward()
        self._num_steps.add_(1)
        self.dense_optimizer.step(self._lr, num_steps=self._num_steps)
        self._loss_sum += loss.detach()


class CeilingStep(WithoutEmbeddings, TrainStep):
    """The ceiling on a CPU."""


class FixedShapeCeilingStep(WithoutEmbeddings, FixedShapeStep):
    """The ceiling on a GPU, captured as the others are."""


def make_step(case: Case, model: torch.nn.Module, rows: TieredRows) -> TrainStep:
    """Give the step that training takes on this device, or what stands for it."""
    args = case.args
    # of plain rows, a step asks no more than how many there are
    slots = np.broadcast_to(np.int32(0), case.num_rows)
    layout = SlotLayout({"all": slots}, num_hot=case.num_hot, table_of_column=[0] * len(case.table_of))
    options: dict[str, Any] = {
        "model": model,
        "rows": rows,
        "dense_optimizer": DenseOptimizer(model.parameters(), optimizer=args.optimizer, eps=1e-8),
        "representations": Representations.plain(layout, embedding_dim=rows.embedding_dim, device=rows.device),
        "most_distinct": sum(min(args.batch, part.stop - part.start) for part in case.table_of),
        "eps": 1e-8,
        "precision": args.precision,
        "kernels": args.kernels,
    }
    if case.name in ("input", *ON_HOST):
        return NoStep(**options)
    if rows.device.type == "cpu":
        return (CeilingStep if case.name == "ceiling" else TrainStep)(**options)
    options |= {"batch_size": args.batch, "num_dense": NUM_DENSE, "num_tables": len(case.table_of)}
    return (FixedShapeCeilingStep if case.name == "ceiling" else FixedShapeStep)(**options)


class NoReads(SampleRing):
    """What a host that has a GPU does of a ring: it brings windows and lays out rounds."""

    def read_slots(self, slots: torch.Tensor, *, ahead: int) -> None:
        """Leave it to the device."""


def make_ring(case: Case, rows: TieredRows) -> SampleRing:
    """Give room for all samples twice, as where two rounds take from all windows of an epoch each."""
    num_samples, batch_size = len(case.samples), case.args.batch
    kind = NoReads if case.name in ON_HOST else SampleRing
    return kind(
        num_samples=2 * num_samples,
        most_samples=num_samples + 2 * batch_size,
        batch_size=batch_size,
        num_dense=NUM_DENSE,
        num_columns=len(case.table_of),
        num_rows=rows.num_rows,
        num_hot=rows.num_hot,
        device=rows.device,
    )


def make_engine(case: Case, device: torch.device) -> Pass:
    """Our modes, and the ceiling."""
    args = case.args
    dim = CONFIGS[args.config]["dim"]
    model = make_model(case, device)
    num_hot = {"baseline": 0, "cached": 0}.get(case.name, case.num_hot)
    lookups = args.batch * len(case.table_of)
    most_distinct = sum(min(args.batch, part.stop - part.start) for part in case.table_of)
    is_in_place = case.name in ("in-place", "host-in-place", "host-windows")
    half = most_distinct if is_in_place else max(lookups, min(16 * lookups, 1 << 19))
    num_staged = 2 * min(half, case.num_rows - num_hot)
    if case.name == "cached":
        num_staged = int(case.num_rows * case.share)
    rows = TieredRows(
        num_rows=case.num_rows,
        num_hot=num_hot,
        embedding_dim=dim,
        num_staged=num_staged,
        optimizer=args.optimizer,
        device=device,
    )
    for tensor in (rows.buffer, rows.cold):
        tensor.uniform_(-0.01, 0.01)
    placement: Placement = StagingHalves(rows)
    if case.name == "cached":
        placement = CachedRows(rows, RowCache(case.num_rows, num_staged, policy="rank", row_counts=case.counts))
    step = make_step(case, model, rows)
    shards = keep_shards(case) if case.name == "input" else None
    if is_in_place:
        plan = NoPlan if case.name in ON_HOST else BatchPlan
        if device.type == "cuda" and case.name == "in-place":
            from slipstream.embedding.tiers.triton_plan import TritonPlan as plan  # needs Triton
        lookahead: Runner = InPlace(
            rows,
            map_to_device(rows.on_host, device),
            batch_size=args.batch,
            num_columns=len(case.table_of),
            most_distinct=most_distinct,
            make_plan=plan,
        )
        if case.name == "host-in-place":
            lookahead._mover = PackedBatches(rows)
        elif case.name == "host-windows" or device.type == "cuda":
            lookahead.keep_samples(make_ring(case, rows))
    else:
        lookahead = LookAhead(
            rows,
            placement,
            chunk_batches=1 if case.name == "baseline" else 16,
            in_thread=True if case.name == "host-look-ahead" else None,
            sorts_all=False if case.name == "host-look-ahead" else None,
        )
    rule = SkipRule(criterion="stale" if case.name == "slipstream" else "none", target_drop=args.drop)
    skipper = Skipper(rule)
    trainer = Trainer(
        step=step,
        lookahead=lookahead,
        lr_schedule=lambda progress: 0.01,
        skipper=skipper,
        schedule=Schedule(
            epochs=1,
            batch_size=args.batch,
            order="interleaved",
            segment_steps=max(1, args.steps // 7),
            round_samples=1 << 21,
        ),
        log_every=10**9,
    )

    groups = split_samples(case)

    def run_pass() -> dict[str, float]:
        trainer.position, trainer.totals.seconds = Position(), 0.0
        totals = trainer.totals
        moved_before = lookahead.bytes_to_device + lookahead.bytes_to_host
        before = (totals.samples_seen, totals.samples_dropped, totals.steps, totals.hot_steps)
        with ThreadPoolExecutor(NUM_LOADERS) as pool:
            trainer.train(lambda epoch: open_streams(groups, pool) if shards is None else open_shards(shards, pool))
        if device.type == "cuda":
            torch.cuda.synchronize()
        after = (totals.samples_seen, totals.samples_dropped, totals.steps, totals.hot_steps)
        seen, dropped, steps, hot_steps = (now - then for now, then in zip(after, before, strict=True))
        return {
            "seconds": totals.seconds,
            "samples": seen + dropped,
            "dropped_share": dropped / (seen + dropped),
            "hot_batch_share": hot_steps / steps,
            "table_bytes_on_device": rows.buffer.nbytes,
            "moved_mb_per_step": (lookahead.bytes_to_device + lookahead.bytes_to_host - moved_before) / steps / 1e6,
        }

    return run_pass


def make_plain(case: Case, device: torch.device, *, use_fbgemm: bool = False, on_host: bool = False) -> Pass:
    """Give a loop in the manner of DLRM's reference: one sparse EmbeddingBag a table, torch.optim.SGD."""
    args = case.args
    dim = CONFIGS[args.config]["dim"]
    model = make_model(case, device)
    sizes = [part.stop - part.start for part in case.table_of]
    rows_at = torch.device("cpu") if on_host else device
    look_up, tables = (make_fbgemm if use_fbgemm else make_bags)(sizes, dim, rows_at)
    dense_optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    row_optimizer = torch.optim.SGD(tables, lr=0.01) if tables else None
    maker = BatchMaker(batch_size=args.batch, order="interleaved")
    groups = split_samples(case)

    def run_pass() -> dict[str, float]:
        started = time.perf_counter()
        with ThreadPoolExecutor(NUM_LOADERS) as pool:
            samples = open_streams(groups, pool)["cold"].take(len(case.samples))
        for batch in maker.make(None, samples, rng=np.random.default_rng(0), last=True):
            rows = torch.from_numpy(batch.slots).to(rows_at).long()
            logits = model(torch.from_numpy(batch.dense).to(device), look_up(rows).to(device))
            labels = torch.from_numpy(batch.labels).to(device)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            dense_optimizer.zero_grad()
            if row_optimizer is not None:
                row_optimizer.zero_grad()
            loss.backward()
            dense_optimizer.step()
            if row_optimizer is not None:
                row_optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "samples": len(case.samples), "table_bytes_on_device": 4 * dim * sum(sizes)}

    return run_pass


def make_bags(sizes: list[int], dim: int, device: torch.device):
    """One nn.EmbeddingBag a table."""
    bags = nn.ModuleList(nn.EmbeddingBag(size, dim, mode="sum", sparse=True, device=device) for size in sizes)

    def look_up(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([bag(rows[:, index : index + 1]) for index, bag in enumerate(bags)], dim=1)

    return look_up, list(bags.parameters())


def make_fbgemm(sizes: list[int], dim: int, device: torch.device):
    """TorchRec's engine: FBGEMM's table-batched bags with the exact fused SGD."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_gpu = device.type == "cuda"
    location = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
    engine = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, dim, location, compute) for size in sizes], optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.01
    )

    def look_up(rows: torch.Tensor) -> torch.Tensor:
        num_samples, num_tables = rows.shape
        offsets = torch.arange(num_samples * num_tables + 1, device=rows.device)
        return engine(rows.t().reshape(-1), offsets).view(num_samples, num_tables, dim)

    return look_up, []


def measure(contender: str, args: argparse.Namespace) -> None:
    """Warm up with one pass, then print the medians of a few more."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    case = make_case(contender, args)
    if case.name in ("plain", "plain-host", "torchrec"):
        run_pass = make_plain(case, device, use_fbgemm=case.name == "torchrec", on_host=case.name == "plain-host")
    else:
        run_pass = make_engine(case, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    run_pass()
    started = time.process_time()
    passes = [run_pass() for _ in range(args.passes)]
    core_seconds = time.process_time() - started
    figures = medians(passes)
    each = [one["seconds"] for one in passes]
    figures["spread"] = (max(each) - min(each)) / figures["seconds"]
    figures["host_core_ms_per_step"] = 1e3 * core_seconds / args.passes / (figures["samples"] / args.batch)
    figures |= floors(case, device)
    figures["samples_per_second"] = figures["samples"] / figures["seconds"]
    figures["steps_per_second"] = figures["samples_per_second"] / args.batch
    figures["peak_host_bytes"] = peak_mb() * 2**20
    figures["peak_device_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    print(json.dumps(figures))


def floors(case: Case, device: torch.device) -> dict[str, float]:
    """Give what a step cannot do without: bytes of memory and bus, FLOP, and the time they take where rates are known.

    Every distinct row is read and written once, rows and gradients of lookups cross memory once each way.
    """
    config, args = CONFIGS[case.args.config], case.args
    lookups = case.samples.X_cat[: args.batch]
    offsets = [part.start for part in case.table_of] if case.name in ("plain", "plain-host", "torchrec") else 0
    distinct = np.unique(lookups.astype(np.int64) + offsets)
    num_cold = 0 if case.name in ON_DEVICE or case.name == "cached" else int((distinct >= case.num_hot).sum())
    row_bytes = 4 * config["dim"]
    memory = row_bytes * (2 * lookups.size + 2 * len(distinct)) + 4 * lookups.size
    flop = step_flop(make_model(case, torch.device("cpu")), args.batch, backward=True)
    found = {
        "distinct_rows": len(distinct),
        "cold_rows": num_cold,
        "least_hbm_mb": memory / 1e6,
        "least_bus_mb": 2 * num_cold * row_bytes / 1e6,
        "gflop": flop / 1e9,
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    for model, (hbm, tf32, bus) in RATES.items():
        if model in name:
            found["floor_ms"] = 1e3 * max(memory / hbm + flop / tf32, num_cold * row_bytes / bus)
    return found


def measure_apart(contenders: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every contender alone in a process of its own, one after the other, `rounds` times over."""
    figures: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    for place in range(args.rounds):
        for contender in list(figures):
            try:
                figures[contender].append(run_apart(__file__, contender, sys.argv[1:]))
            except SystemExit as exc:
                if place:
                    raise
                reason = str(exc).strip().splitlines()[-1]
                print(f"{contender}: not measured: {reason}", file=sys.stderr)
                del figures[contender]
    for runs in figures.values():
        for place, run in enumerate(runs):
            for base in ("ceiling", "plain"):
                if base in figures:
                    run[f"x_{base}"] = run["samples_per_second"] / figures[base][place]["samples_per_second"]
            if "fae 0.1" in figures:
                run["time_to_fae"] = run["seconds"] / figures["fae 0.1"][place]["seconds"]
    return figures


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median of every figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def show(results: dict[str, dict[str, float]], args: argparse.Namespace) -> Iterator[str]:
    """Give the table."""
    yield (
        f"{'contender':<16}{'samples/s':>11}{'steps/s':>9}{'x ceiling':>10}{'x plain':>9}"
        f"{'tables on device':>18}{'host MiB':>10}{'core-ms/step':>13}{'bus MB/step':>12}{'floor ms':>9}{'spread':>8}"
    )
    for name, figures in results.items():
        ratios = [f"{figures[key]:.2f}" if key in figures else "-" for key in ("x_ceiling", "x_plain")]
        yield (
            f"{name:<16}{figures['samples_per_second']:>11,.0f}{figures['steps_per_second']:>9.1f}{ratios[0]:>10}"
            f"{ratios[1]:>9}{figures['table_bytes_on_device'] / 2**20:>14.1f} MiB"
            f"{figures['peak_host_bytes'] / 2**20:>10,.0f}{figures['host_core_ms_per_step']:>13.2f}"
            f"{figures.get('moved_mb_per_step', 0.0):>12.2f}"
            + (f"{figures['floor_ms']:>9.2f}" if "floor_ms" in figures else f"{'-':>9}")
            + f"{figures['spread']:>8.1%}"
        )
    dropping = results.get("slipstream 0.1", {})
    if dropping.get("dropped_share") and "time_to_fae" in dropping:
        saved = 1 - dropping["time_to_fae"]
        yield (
            f"slipstream dropped {dropping['dropped_share']:.1%} of all samples and saved {saved:.1%} of the time: "
            f"{saved / dropping['dropped_share']:.2f} of the share dropped"
        )


def main() -> None:
    """Measure, show, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="", help="left out: cached-embedding on cuda, else kaggle")
    parser.add_argument("--contenders", default="", help="comma-separated; left out, those that suit the device")
    parser.add_argument("--contender", help="measure this one alone, and print a JSON line")
    parser.add_argument("--rows", type=int, default=0, help="rows of all tables; 0: all 33.8M on cuda, else 2M")
    parser.add_argument("--steps", type=int, default=70, help="batches of one pass")
    parser.add_argument("--batch", type=int, default=0, help="0 takes the configuration's")
    parser.add_argument("--zipf", type=float, default=1.1)
    parser.add_argument("--drop", type=float, default=0.5, help="D of contender slipstream")
    parser.add_argument("--optimizer", choices=OPTIMIZERS.names(), default="sgd")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--kernels", choices=["torch", "triton"], default="", help="of our own: triton on cuda, else torch"
    )
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="", help="tf32 on cuda, else fp32")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--passes", type=int, default=3, help="timed passes of a process; their median counts")
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    args.config = args.config or ("cached-embedding" if on_cuda else "kaggle")
    args.rows = args.rows or (sum(KAGGLE_SIZES) if on_cuda else 2_000_000)
    args.precision = args.precision or ("tf32" if on_cuda else "fp32")
    args.kernels = args.kernels or ("triton" if on_cuda else "torch")
    args.contenders = args.contenders or ",".join(CUDA_CONTENDERS if on_cuda else CONTENDERS)
    args.batch = args.batch or CONFIGS[args.config]["batch"]
    if args.contender:
        measure(args.contender, args)
        return
    runs = measure_apart([name.strip() for name in args.contenders.split(",")], args)
    results = {contender: medians(measured) for contender, measured in runs.items()}
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{args.config}: {args.rows:,} rows, batch {args.batch}, {args.steps} steps, {args.optimizer}, {hardware}")
    print("\n".join(show(results, args)))
    print(json.dumps({"benchmark": "train", "hardware": hardware, "args": vars(args), "results": results}))


if __name__ == "__main__":
    main()
