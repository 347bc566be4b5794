"""From a pipeline file to what trains: how tables are held, the assembly, the trainer.

Training takes flat arguments and knows no pipeline file. Whoever trains from one, or asks what such a training would
take, puts it together here, so that what is forecast and what trains are made by the same calls.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from slipstream.config import PipelineConfig, TablesConfig, TrainConfig
from slipstream.distributed.environment import count_ranks, ranks_on_host
from slipstream.distributed.gradients import GradientSums
from slipstream.distributed.lookahead import SharedLookAhead
from slipstream.distributed.ranks import Ranks
from slipstream.distributed.rows import ShardedRows
from slipstream.embedding.tiers.in_place import InPlace, Runner
from slipstream.embedding.tiers.lookahead import Batch, LookAhead
from slipstream.embedding.tiers.on_disk import DiskRows
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.errors import CapacityError, ConfigError
from slipstream.io.figures import TableFigures
from slipstream.io.processors import usable_cores
from slipstream.ops.learning_rate import learning_rate
from slipstream.ops.precision import choose_ranges
from slipstream.options import parse_budget, pick
from slipstream.training.assemble import Assembly, Design, Settings, assemble
from slipstream.training.device import fitting_the_device, resolve_device
from slipstream.training.footprint import assemble_weightless
from slipstream.training.loop import StepReport, Trainer
from slipstream.training.order.schedule import Schedule, default_segment_steps, most_in_windows
from slipstream.training.order.shards import WINDOW_SAMPLES
from slipstream.training.representations import TableSpec
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.skipper import Skipper
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.threads import choose_threads, step_flop
from slipstream.training.validation import Validation

_log = logging.getLogger(__name__)
ROUND_SAMPLES = 250_000
"""Most samples of a round."""


def choose_tables(config: PipelineConfig, figures: TableFigures, counts: np.ndarray) -> list[TableSpec]:
    """Decide how each table is held.

    Args:
        config: The pipeline.
        figures: What is known of the tables.
        counts: Access counts per global row. Shape (V,), int64.

    Raises:
        ConfigError: An override names no table, a table whose padding must be a row of zeros would be held as cores,
            or the budget of mixed tables is too small.
    """
    specs = _choose_alone(config.tables, figures.rows_per_table, figures.zero_rows)
    mixed = [at for at, spec in enumerate(specs) if spec.representation == "mixed"]
    if not mixed:
        return specs
    starts = np.cumsum([0, *figures.rows_per_table.values()])
    row_width, total = config.model.row_width, sum(specs[at].num_rows for at in mixed)
    fp32_bytes = 4 * row_width * total
    try:
        chosen = choose_ranges(
            [counts[starts[at] : starts[at + 1]] for at in mixed],
            formats=config.tables.formats_for(row_width),
            row_width=row_width,
            scale_bytes=[4 if specs[at].scale_per == "row" else 0 for at in mixed],
            budget_bytes=parse_budget(config.tables.mixed_budget, total_bytes=fp32_bytes),
            may_share=[specs[at].name not in (figures.padding_rows or {}) for at in mixed],
        )
    except ValueError as exc:
        raise ConfigError(
            f"`tables.mixed_budget` is too small for {len(mixed)} tables of {total:,} rows, {fp32_bytes:,} bytes as "
            f"fp32: {exc}",
            hint="raise tables.mixed_budget, lower model.embedding_dim, or allow smaller tables.mixed_formats",
        ) from exc
    for at, cuts in zip(mixed, chosen, strict=True):
        specs[at] = replace(specs[at], cuts=cuts)
    return specs


def _choose_alone(config: TablesConfig, tables: Mapping[str, int], zero_rows: Mapping[str, int]) -> list[TableSpec]:
    """Decide how each table is held, but for what mixed ones share a budget for.

    Args:
        config: Section `tables`.
        tables: Rows of each table, in order.
        zero_rows: Tables with a row that must be zero, since the model knows padding by that, and that row.
    """
    for name in config.overrides:
        if name not in tables:
            raise ConfigError(
                f"`tables.overrides.{name}` names no table", hint=f"this data set has {', '.join(tables)}"
            )
    specs = []
    for name, num_rows in tables.items():
        choice = config.choice_for(name, num_rows)
        assert choice.representation and choice.scale_per and choice.period and choice.tt_ranks
        if choice.representation == "tt" and name in zero_rows:
            raise ConfigError(
                f"table `{name}` has a padding row, which must stay zero, and tensor-train cores have no single rows",
                hint=f'give it rows: [tables.overrides.{name}] representation = "dense"',
            )
        specs.append(
            TableSpec(
                name=name,
                num_rows=num_rows,
                representation=choice.representation,
                scale_per=choice.scale_per,
                period=choice.period,
                tt_ranks=choice.tt_ranks,
            )
        )
    return specs


def put_together(
    config: PipelineConfig,
    *,
    layout: SlotLayout,
    specs: Sequence[TableSpec],
    figures: TableFigures,
    counts: np.ndarray,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Assembly:
    """Put together what trains.

    Args:
        config: The pipeline.
        layout: Slots of the tables.
        specs: How each table is held, in the order of the layout.
        figures: Padding rows and dense columns.
        counts: Access counts per global row. Shape (V,), int64.
        device: Where to train.
        ranks: Who trains together; None for a process alone.

    Raises:
        CapacityError: The device has no room for it.
    """
    sums = None
    if ranks is not None:
        exchange = config.distributed
        sums = GradientSums(
            ranks,
            compress_dense=exchange.compress_dense,
            compress_rows=exchange.compress_rows,
            seed=config.train_seed,
        )
    return assemble(_design(config, layout, specs, figures, counts), seed=config.train_seed, device=device, sums=sums)


def put_together_weightless(
    config: PipelineConfig,
    *,
    layout: SlotLayout,
    specs: Sequence[TableSpec],
    figures: TableFigures,
    counts: np.ndarray,
    on_cuda: bool,
) -> Assembly:
    """Put together what would train, with tensors that have no memory: see `footprint.py`.

    Args:
        config: The pipeline.
        layout: As in `put_together`.
        specs: As there.
        figures: As there.
        counts: As there.
        on_cuda: Whether the step is the one that a GPU gets.
    """
    return assemble_weightless(_design(config, layout, specs, figures, counts), on_cuda=on_cuda)


def _design(
    config: PipelineConfig, layout: SlotLayout, specs: Sequence[TableSpec], figures: TableFigures, counts: np.ndarray
) -> Design:
    return Design(
        settings=pick(Settings, config.train),
        layout=layout,
        specs=specs,
        padding_rows=figures.padding_rows or {},
        bags=figures.bags or (),
        counts=counts,
        network=config.model,
        linear_bits=config.tables.quantize_linears,
        quantize_biases=config.tables.quantize_biases,
        num_dense=figures.num_dense,
    )


def make_trainer(
    config: PipelineConfig,
    parts: Assembly,
    *,
    num_train: int,
    on_report: Callable[[StepReport], None] = lambda report: None,
    on_batch: Callable[[Batch, float], None] | None = None,
    between_chunks: Callable[[Trainer], None] = lambda trainer: None,
    validation: Validation | None = None,
    most_steps: int | None = None,
) -> Trainer:
    """Make the loop that every mode shares.

    Args:
        config: The pipeline.
        parts: What trains.
        num_train: Training samples of an epoch.
        on_report: Hears reports.
        on_batch: Hears every batch and its learning rate.
        between_chunks: Called with the trainer whenever no row is moving.
        validation: Measures what would be served while training goes on.
        most_steps: Steps after which training ends; None for none.
    """
    train = config.train
    runner = _make_runner(train, parts)
    _keep_samples(config, parts, runner, num_train=num_train)
    schedule = Schedule(
        epochs=train.epochs,
        batch_size=train.batch_size,
        order=train.order,
        segment_steps=config.skip.refresh_steps or default_segment_steps(num_train, train.batch_size),
        round_samples=ROUND_SAMPLES,
        warmup_steps=config.skip.warmup_steps,
        window_steps=config.skip.window_steps,
        positive_weight=train.positive_weight,
        smaller_by=config.skip.target_drop if config.skip.keep_steps else 0.0,
        seed=config.train_seed,
    )
    return Trainer(
        step=parts.step,
        lookahead=runner,
        lr_schedule=partial(learning_rate, lr=train.lr, warmup=train.lr_warmup, decay=train.lr_decay),
        skipper=Skipper(skip_rule_of(config, parts), columns=parts.columns),
        schedule=schedule,
        log_every=train.log_every,
        average=train.average,
        validation=validation,
        padding_slots=parts.padding_slots,
        on_report=on_report,
        on_batch=on_batch,
        between_chunks=between_chunks,
        most_steps=most_steps,
    )


def _make_runner(train: TrainConfig, parts: Assembly) -> Runner:
    """Make what runs batches through the step, their rows on the device."""
    padding = parts.representations.padded
    if isinstance(parts.placement, InPlace):
        parts.placement.padding = padding
        parts.placement.range_of_slot = parts.representations.range_of_slot
        return parts.placement
    chunk_batches = 1 if train.mode == "baseline" else train.chunk_batches
    options: dict[str, Any] = {"chunk_batches": chunk_batches, "columns": parts.columns, "padding": padding}
    if isinstance(parts.rows, ShardedRows):
        return SharedLookAhead(parts.rows, parts.placement, **options)
    # who waits for a disk takes no time from the computation, on a CPU either
    in_thread = True if isinstance(parts.rows, DiskRows) else None
    ranges = parts.representations.range_of_slot
    return LookAhead(parts.rows, parts.placement, in_thread=in_thread, range_of_slot=ranges, **options)


def _keep_samples(config: PipelineConfig, parts: Assembly, runner: Runner, *, num_train: int) -> None:
    """Have the device take batches from windows of samples, where that is asked for or a GPU has room for them.

    Raises:
        CapacityError: It was asked for, and there is no room.
        ConfigError: It was asked for, and the host brings cold rows, or must say how rows of mixed tables are stored.
    """
    train, layout = config.train, parts.layout
    if train.shuffle_on == "host" or (train.shuffle_on == "auto" and not parts.on_cuda):
        return
    if not isinstance(runner, InPlace):
        if train.shuffle_on == "auto":
            return
        raise ConfigError(
            "`train.shuffle_on` is device, and the device does not read cold rows in place",
            hint="set train.cold_access to 'in_place', or train.shuffle_on to 'auto' or 'host'",
        )
    if runner.range_of_slot is not None:
        if train.shuffle_on == "auto":
            return
        raise ConfigError(
            "`train.shuffle_on` is device, and the host says of each batch how the rows of mixed tables are stored",
            hint="set train.shuffle_on to 'auto' or 'host', or hold tables otherwise",
        )
    window_samples = max(WINDOW_SAMPLES, config.segregate.samples_per_shard)
    num_samples = most_in_windows(num_train, round_samples=ROUND_SAMPLES, window_samples=window_samples)
    try:
        with fitting_the_device(f"windows of {num_samples:,} samples"):
            ring = SampleRing(
                num_samples=num_samples,
                most_samples=min(num_train, ROUND_SAMPLES) + 2 * train.batch_size,
                batch_size=train.batch_size,
                num_dense=parts.num_dense,
                num_columns=len(layout.column_tables),
                num_rows=parts.rows.num_rows,
                num_hot=parts.rows.num_hot,
                device=parts.rows.device,
                columns=parts.columns,
                padding=parts.representations.padded,
                slot_type=torch.int32 if layout.num_slots < 2**31 else torch.int64,
            )
    except CapacityError as exc:
        if train.shuffle_on == "device":
            raise CapacityError(str(exc), hint="set train.shuffle_on to 'host' or 'auto'") from exc
        _log.warning(f"the host shuffles samples: {exc}")
        return
    runner.keep_samples(ring)


def skip_rule_of(config: PipelineConfig, parts: Assembly) -> SkipRule:
    """Give the criterion in force, with what it has to know of the tables."""
    rule = replace(config.skip_rule, alpha_tables=alpha_tables_of(config, parts))
    if config.skip.scorer == "model":
        return rule
    padded = parts.representations.padded
    padding = () if padded is None else tuple(sorted({*padded.slots.tolist()}))
    return replace(rule, num_rows=parts.layout.num_slots, num_dense=parts.num_dense, padding_slots=padding)


def alpha_tables_of(config: PipelineConfig, parts: Assembly) -> tuple[int, ...]:
    """Give the table of each watched column, where `skip.alpha_per` is `table`; else nothing."""
    if config.skip.alpha_per == "sample":
        return ()
    layout = parts.layout
    tables = [layout.tables.index(name) for name in layout.column_tables]
    return tuple(tables) if parts.columns is None else tuple(tables[column] for column in parts.columns)


def num_threads(config: PipelineConfig, parts: Assembly) -> int:
    """CPU threads of training; on another device they have too little to do to choose."""
    if resolve_device(config.train.device).type != "cpu":
        return config.train.num_threads or torch.get_num_threads()
    num_ranks, here = count_ranks(os.environ), ranks_on_host(os.environ)
    flop = step_flop(parts.model, -(-config.train.batch_size // num_ranks), backward=True)
    cores = max(1, usable_cores() // here)
    return choose_threads(config.train.num_threads, flop=flop, cores=cores, default=torch.get_num_threads())
