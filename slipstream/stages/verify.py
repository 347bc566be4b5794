"""Verify: does a pipeline train the model that a plain loop trains?

Reads   segregate/   shards, slots.npz; profile/ counts.parquet
Writes  nothing; what it found goes to train/ certificate.json
Keeps   both trainings see the same batches in the same order, with the same learning rates and weights
Costs   some steps of training, twice; memory for all tables twice, with optimizer state
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from slipstream.config import PipelineConfig
from slipstream.embedding.tiers.lookahead import Batch
from slipstream.errors import ConfigError
from slipstream.io.artifacts import Artifact
from slipstream.io.capacity import require_memory
from slipstream.io.certificates import Certificate, Comparison
from slipstream.io.counts import read_counts
from slipstream.io.environment import describe_environment
from slipstream.io.figures import SegregateFigures
from slipstream.progress import Progress
from slipstream.stage import trained_row_bytes
from slipstream.training.assemble import Assembly
from slipstream.training.device import resolve_device
from slipstream.training.loop import Trainer
from slipstream.training.order.shards import Shards, read_slot_maps
from slipstream.training.plain import PlainRule, PlainTraining
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.threads import torch_threads
from slipstream.wiring import choose_tables, make_trainer, num_threads, put_together

ON_GPU = 1e-4
"""Largest difference allowed where sums are made in the order in which threads arrive."""


def run(
    config: PipelineConfig, *, segregated: Artifact, profiled: Artifact, steps: int, progress: Progress
) -> Certificate:
    """Train twice and compare every parameter.

    Args:
        config: The pipeline.
        segregated: The segregate artifact.
        profiled: The profile artifact, for mode `cached`.
        steps: Steps to train; fewer where the schedule has no more.
        progress: Told how far it is.

    Returns:
        What was found.

    Raises:
        ConfigError: The pipeline trains what has no plain counterpart; names it.
        CapacityError: There is no memory for two trainings.
    """
    figures = SegregateFigures.of(segregated)
    check_comparable(config, figures.rows_per_table)
    require_memory(
        3 * figures.rows * trained_row_bytes(config),
        purpose="verify, which trains all tables twice,",
        hint="verify a smaller pipeline of the same settings: raise `preprocess.freq_threshold`, lower "
        "`preprocess.max_rows`",
    )
    slot_maps = read_slot_maps(segregated)
    parts = _assemble(config, figures, slot_maps, read_counts(profiled))
    plain = _plain_training(config, figures)
    threads = num_threads(config, parts)
    with torch_threads(threads), progress.task("verify", 2 * steps, "steps") as advance:
        seen: list[tuple[Batch, float]] = []

        def record(batch: Batch, lr: float) -> None:
            seen.append((batch, lr))
            advance(1, "as configured")

        trainer = make_trainer(config, parts, num_train=figures.num_train, on_batch=record, most_steps=steps)
        with Shards(segregated, parts.layout).streams(seed=config.train_seed) as open_streams:
            trainer.train(open_streams)
        row_of_slot = _invert(slot_maps)
        for batch, lr in seen:
            weights = None if batch.weights is None else torch.from_numpy(batch.weights)
            rows = torch.from_numpy(row_of_slot[batch.slots])
            plain.step(
                torch.from_numpy(batch.dense),
                rows,
                torch.from_numpy(batch.labels),
                weights,
                lr=lr,
                divisor=batch.divisor or config.train.batch_size,
            )
            advance(1, "plainly")
    compared = _compare(parts, slot_maps, plain)
    on_cpu = parts.rows.device.type == "cpu"
    return Certificate(
        verdict=_judge(compared, to_the_bit=on_cpu),
        promise="to the bit" if on_cpu else f"within {ON_GPU:g}",
        steps=len(seen),
        samples=sum(len(batch) for batch, _ in seen),
        mode=config.train.mode,
        model=config.model.name,
        optimizer=config.train.optimizer,
        device=parts.rows.device.type,
        threads=threads,
        skipping=_describe_skipping(config, trainer, [batch for batch, _ in seen]),
        not_compared=_leave_out(config),
        seed=config.train_seed,
        batches_xxh3=_hash_batches([batch for batch, _ in seen]),
        inputs={"segregate": segregated.fingerprint, "profile": profiled.fingerprint},
        parameters=compared,
        environment=describe_environment(),
    )


def check_comparable(config: PipelineConfig, tables: Mapping[str, int]) -> None:
    """Refuse what the plain loop has no counterpart of.

    Raises:
        ConfigError: Names it.
    """
    held = {name: config.tables.choice_for(name, num_rows).representation for name, num_rows in tables.items()}
    others = sorted({f"{kind} ({name})" for name, kind in held.items() if kind != "dense"})
    refused = []
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        refused.append(f"tables that are not dense fp32: {shown}")
    if config.tables.quantize_linears:
        refused.append(f"layers on {config.tables.quantize_linears} bits")
    if config.train.faithful:
        refused.append("the published order of `train.faithful`, which is no plain loop")
    if config.train.init_from:
        refused.append("a training that starts from another model, by `train.init_from`")
    if refused:
        raise ConfigError(
            f"verify has no plain counterpart of {'; nor of '.join(refused)}",
            hint="verify the same pipeline without them, for instance --set 'tables={}'",
        )


def _assemble(
    config: PipelineConfig, figures: SegregateFigures, slot_maps: Mapping[str, np.ndarray], counts: np.ndarray
) -> Assembly:
    """Put together what trains as configured."""
    return put_together(
        config,
        layout=SlotLayout(slot_maps, num_hot=figures.hot_rows, table_of_column=figures.column_tables),
        specs=choose_tables(config, figures, counts),
        figures=figures,
        counts=counts,
        device=resolve_device(config.train.device),
    )


def _plain_training(config: PipelineConfig, figures: SegregateFigures) -> PlainTraining:
    names = list(figures.rows_per_table)
    train = config.train
    return PlainTraining(
        network=config.model,
        rows_per_table=figures.rows_per_table,
        column_tables=[names[table] for table in figures.column_tables],
        padding_rows=figures.padding_rows or {},
        bags=figures.bags or (),
        num_dense=figures.num_dense,
        rule=PlainRule(
            optimizer=train.optimizer,
            eps=train.eps,
            weight_decay=train.weight_decay,
            bf16=train.precision == "bf16",
        ),
        seed=config.train_seed,
    )


def _invert(slot_maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Give the row of its table that each slot stands for. Shape (V,), int64."""
    row_of_slot = np.empty(sum(map(len, slot_maps.values())), np.int64)
    for slots in slot_maps.values():
        row_of_slot[slots] = np.arange(len(slots))
    return row_of_slot


def _compare(parts: Assembly, slot_maps: Mapping[str, np.ndarray], plain: PlainTraining) -> list[Comparison]:
    compared = [
        compare(f"tables.{name}", parts.rows.gather(torch.from_numpy(slots)), plain.bags[name].weight)
        for name, slots in slot_maps.items()
    ]
    expected = dict(plain.network.named_parameters())
    return compared + [compare(f"dense.{name}", own, expected[name]) for name, own in parts.model.named_parameters()]


def compare(name: str, own: Tensor, expected: Tensor) -> Comparison:
    """Compare two float32 tensors of one shape."""
    mine, theirs = own.detach().cpu().contiguous(), expected.detach().contiguous()
    is_equal = mine.view(torch.int32) == theirs.view(torch.int32)
    difference = (mine.double() - theirs.double()).abs()
    ulp = (_ordered(mine) - _ordered(theirs)).abs()
    return Comparison(
        name=name,
        shape=list(mine.shape),
        differing=int((~is_equal).sum()),
        largest_difference=float(difference.nan_to_num(float("inf")).max()) if mine.numel() else 0.0,
        largest_ulp=int(ulp.max()) if mine.numel() else 0,
        xxh3=xxhash.xxh3_64_hexdigest(mine.numpy().data),
    )


def _ordered(values: Tensor) -> Tensor:
    """Give float32 values numbers in their order, so that neighbours differ by one; -0 and 0 have the same."""
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFF_FFFF), bits)


def _judge(compared: Sequence[Comparison], *, to_the_bit: bool) -> str:
    if not any(one.differing for one in compared):
        return "equal to the bit"
    if not to_the_bit and all(one.largest_difference <= ON_GPU for one in compared):
        return "equal within tolerance"
    return "different"


def _describe_skipping(config: PipelineConfig, trainer: Trainer, batches: Sequence[Batch]) -> str:
    if config.criterion == "none":
        return "nothing is skipped"
    weighted = sum(batch.weights is not None for batch in batches)
    return (
        f"`{config.criterion}` in force: {trainer.totals.samples_dropped:,} samples left out of the rounds that began; "
        f"the plain loop trained on what was kept, with the same weights in {weighted:,} of {len(batches):,} batches"
    )


def _leave_out(config: PipelineConfig) -> list[str]:
    left_out = ["optimizer state"]
    if config.train.average:
        left_out.append("the mean over steps of `train.average`: weights are compared as they are before it")
    return left_out


def _hash_batches(batches: Sequence[Batch]) -> str:
    digest = xxhash.xxh3_64()
    for batch in batches:
        for array in (batch.dense, batch.slots, batch.labels, batch.weights):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
