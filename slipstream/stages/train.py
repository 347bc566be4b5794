"""Train: shards to a model, with hot rows on the device and cold rows on the host.

Reads   segregate/   hot, cold, val and test shards, slots.npz
Writes  train/       model.safetensors, model.json, vocab/: the whole model
                     predictions_{val,test}.npy, staleness.json, losses.json, events/
Keeps   each row in one place; over the same batch order every exact mode ends with the same model
Costs   one pass over the training shards an epoch; device memory for hot rows, staging and what watches rows move
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from slipstream.config import SkipConfig, TablesConfig, TrainConfig
from slipstream.embedding.quantized import quantize_linears
from slipstream.embedding.row_cache import RowCache
from slipstream.embedding.tiers.lookahead import LookAhead
from slipstream.embedding.tiers.placement import CachedRows, Placement, StagingHalves
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.errors import CapacityError, ConfigError
from slipstream.io.artifacts import Artifact, write_atomically, write_json
from slipstream.io.samples import Samples, read_shard, table_of_column
from slipstream.models.model import Model
from slipstream.ops.metrics import measure_quality
from slipstream.ops.plausibility import doubt_quality
from slipstream.options import to_dict
from slipstream.progress import Progress
from slipstream.serving.encoder import describe_encoding, write_vocabularies
from slipstream.training.checkpoint import Checkpointer
from slipstream.training.dense_optimizer import DenseOptimizer
from slipstream.training.faithful import FaithfulRule, FaithfulTrainer
from slipstream.training.loop import LoopTotals, StepReport, Trainer
from slipstream.training.model_file import save_model
from slipstream.training.order.schedule import Schedule, default_segment_steps
from slipstream.training.order.stream import SampleStream
from slipstream.training.predict import predict
from slipstream.training.representations import Representations, TableSpec
from slipstream.training.skipping.skipper import Criterion, Skipper, SkipRule
from slipstream.training.slot_layout import SlotLayout
from slipstream.training.step import FixedShapeStep, TrainStep

_WINDOW_SAMPLES = 2_000_000
"""Samples shuffled together."""
_ROUND_SAMPLES = 1_000_000
"""Most samples of a round."""
_NUM_LOADERS = 8
"""Threads that read shards."""
_STAGING_CAP = 1 << 19
"""Rows a staging half holds by default, unless one batch needs more."""


def run(
    config: TrainConfig,
    *,
    model_config: Model,
    skip_config: SkipConfig,
    tables_config: TablesConfig,
    criterion: Criterion,
    processed: Artifact,
    segregated: Artifact,
    counts: np.ndarray,
    seed: int,
    fingerprint: str,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train and evaluate; goes on from a checkpoint in `scratch` where there is one.

    Args:
        config: Section `train`.
        model_config: Section `model`.
        skip_config: Section `skip`.
        tables_config: Section `tables`.
        criterion: The skip criterion in force.
        processed: The preprocess artifact, whose vocabularies and transforms go with the model.
        segregated: The segregate artifact.
        counts: Access counts per global row, which mode `cached` ranks by. Shape (V,), int64.
        seed: Of initial weights, batch order and dropping.
        fingerprint: Of this run, so that no other run's checkpoint is taken up.
        scratch: Folder to write to.
        progress: Told how far it is.

    Returns:
        Counts for the manifest: metrics, samples seen and dropped, throughput, bytes per tier.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    write_vocabularies(processed, scratch)
    device = resolve_device(config.device)
    check_kernels(config.kernels, device)
    num_dense: int = segregated.counts["num_dense"]
    padding_rows: Mapping[str, int] = segregated.counts.get("padding_rows", {})
    specs = choose_tables(tables_config, segregated.counts["tables"], padding_rows)
    layout = SlotLayout(
        _read_slot_maps(segregated),
        num_hot=segregated.counts["hot_rows"],
        table_of_column=table_of_column(segregated.counts),
        outside={spec.name for spec in specs if spec.representation == "tt"},
    )
    if criterion == "stale" and not layout.inside:
        raise ConfigError(
            "criterion `stale` watches rows move, and no table has rows: all are held as tensor-train cores",
            hint="choose another skip.criterion, or let small tables be dense",
        )
    num_columns = len(layout.column_tables)
    rows, placement = _place_rows(config, model_config, layout, counts, device=device)
    _init_rows(rows, layout, padding_rows, seed=seed)
    representations = _represent(config, specs, layout, rows, seed=seed)
    torch.manual_seed(seed)
    model = model_config.build(num_dense=num_dense, num_columns=num_columns).to(device)
    if tables_config.quantize_linears:
        quantize_linears(model, tables_config.quantize_linears)
    num_train = segregated.counts["samples"]["hot"] + segregated.counts["samples"]["cold"]
    checkpoints = Checkpointer(
        scratch / "work" / "checkpoint.safetensors",
        fingerprint=fingerprint,
        every_steps=config.checkpoint_steps,
    )
    with (
        SummaryWriter(str(scratch / "events")) as events,
        ThreadPoolExecutor(max_workers=_NUM_LOADERS, thread_name_prefix="shards") as workers,
    ):
        step = _make_step(config, model, rows, representations, num_dense=num_dense, layout=layout)

        def open_streams(epoch: int) -> dict[str, SampleStream]:
            return {
                group: _open_stream(segregated, group, layout, seed=(seed, epoch), workers=workers)
                for group in ("hot", "cold")
            }

        with (
            progress.task("train", num_train * config.epochs, "samples") as advance,
            _fitting_the_device(f"training in batches of {config.batch_size:,}"),
        ):
            if config.faithful:
                figures = _train_faithfully(config, skip_config, criterion, segregated, step, open_streams, seed)
            else:
                trainer = Trainer(
                    step=step,
                    lookahead=LookAhead(
                        rows,
                        placement,
                        chunk_batches=1 if config.mode == "baseline" else config.chunk_batches,
                        columns=None if layout.is_whole else layout.columns,
                    ),
                    lr_schedule=_lr_schedule(config),
                    skipper=Skipper(
                        _skip_rule(skip_config, criterion, num_rows=layout.num_slots, num_dense=num_dense),
                        columns=None if layout.is_whole else layout.columns,
                    ),
                    schedule=_schedule(config, skip_config, num_train, seed),
                    log_every=config.log_every,
                    on_report=_listener(events, advance),
                    between_chunks=checkpoints.between_chunks,
                )
                checkpoints.restore(trainer)
                trainer.train(open_streams)
                figures = _figures(trainer, placement)
                write_json(scratch / "staleness.json", [asdict(check) for check in trainer.skipper.checks])
                write_json(scratch / "losses.json", trainer.totals.losses)
        batch_size = config.eval_batch_size
        with _fitting_the_device(f"evaluation in batches of {batch_size:,}", hint="lower `train.eval_batch_size`"):
            quality = _evaluate(
                step, segregated, layout, scratch, events, at_step=figures["steps"], batch_size=batch_size
            )
    save_model(
        scratch,
        model=model,
        rows=rows,
        slot_maps=layout.slot_maps,
        description={
            "num_dense": num_dense,
            "tables": segregated.counts["tables"],
            "column_tables": layout.column_tables,
            "quantize_linears": tables_config.quantize_linears,
            "encoding": describe_encoding(processed).to_json(),
            **to_dict(model_config),
        },
        representations=representations,
    )
    warnings = doubt_quality({split: figure["ne"] for split, figure in quality.items()})
    return {**quality, "device": device.type, **figures, "warnings": warnings}


def resolve_device(name: str) -> torch.device:
    """The accelerator to use; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`train.device` is cuda, and torch finds no CUDA device", hint="use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_kernels(name: str, device: torch.device) -> None:
    """Check that what looks up and updates rows can run.

    Raises:
        ConfigError: `triton` without a GPU, or without the package.
    """
    if name == "triton" and device.type != "cuda":
        raise ConfigError("`train.kernels` is triton, and training runs on the CPU", hint="use torch, or a GPU")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "`train.kernels` is triton, and the package is not installed", hint="use torch, or pip install triton"
        )


def choose_tables(config: TablesConfig, tables: Mapping[str, int], padding_rows: Mapping[str, int]) -> list[TableSpec]:
    """How each table is held.

    Args:
        config: Section `tables`.
        tables: Rows of each table, in order.
        padding_rows: Tables with a row that stays zero, and that row.

    Raises:
        ConfigError: An override names no table, or a table with padding would be held as cores.
    """
    for name in config.overrides:
        if name not in tables:
            raise ConfigError(
                f"`tables.overrides.{name}` names no table", hint=f"this data set has {', '.join(tables)}"
            )
    specs = []
    for name, num_rows in tables.items():
        choice = config.choice_for(name, num_rows)
        assert choice.representation and choice.period and choice.tt_ranks
        if choice.representation == "tt" and name in padding_rows:
            raise ConfigError(
                f"table `{name}` has a padding row, which must stay zero, and tensor-train cores have no single rows",
                hint=f'give it rows: [tables.overrides.{name}] representation = "dense"',
            )
        specs.append(
            TableSpec(
                name=name,
                num_rows=num_rows,
                representation=choice.representation,
                period=choice.period,
                tt_ranks=choice.tt_ranks,
            )
        )
    return specs


def _represent(
    config: TrainConfig, specs: Sequence[TableSpec], layout: SlotLayout, rows: TieredRows, *, seed: int
) -> Representations | None:
    if all(spec.representation == "dense" for spec in specs):
        return None
    representations = Representations(
        specs,
        layout=layout,
        embedding_dim=rows.embedding_dim,
        optimizer=config.optimizer,
        eps=config.eps,
        seed=seed,
        device=rows.device,
    )
    representations.settle(rows)
    return representations


def _place_rows(
    config: TrainConfig,
    model_config: Model,
    layout: SlotLayout,
    counts: np.ndarray,
    *,
    device: torch.device,
) -> tuple[TieredRows, Placement]:
    num_rows = layout.num_rows
    num_hot = {"resident": num_rows, "baseline": 0, "cached": 0}.get(config.mode, layout.num_hot)
    if config.faithful:
        num_hot = 0  # the master copy of every row is on the host
    num_cold = num_rows - num_hot
    lookups = config.batch_size * len(layout.columns)
    # a quarter of the cold rows is plenty where it holds a batch: chunks that do not fit are split
    half = config.staging_rows or max(lookups, min(config.chunk_batches * lookups, _STAGING_CAP, num_cold // 4))
    num_staged = 2 * min(half, num_cold)
    if config.mode == "cached":
        num_staged = max(1, int(num_rows * config.cache_ratio))
    dim = model_config.row_width
    with _fitting_the_device(f"{num_hot:,} hot rows and {num_staged:,} staged rows of {dim} floats"):
        rows = TieredRows(
            num_rows=num_rows,
            num_hot=num_hot,
            embedding_dim=dim,
            num_staged=num_staged,
            optimizer=config.optimizer,
            device=device,
        )
    if config.mode != "cached":
        return rows, StagingHalves(rows)
    return rows, CachedRows(rows, _make_cache(config, layout.counts_by_slot(counts), num_staged))


@contextmanager
def _fitting_the_device(
    what: str, *, hint: str = "lower `segregate.hot_budget`, `train.cache_ratio` or `train.staging_rows`"
) -> Iterator[None]:
    """Say what the device had no room for."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise CapacityError(f"the device has no room for {what}: {exc}", hint=hint) from exc


def _make_cache(config: TrainConfig, slot_counts: np.ndarray, capacity: int) -> RowCache:
    by_rank = config.cache_policy == "rank"
    return RowCache(
        len(slot_counts),
        capacity,
        policy=config.cache_policy,
        row_counts=slot_counts if by_rank else None,
    )


def _make_step(
    config: TrainConfig,
    model: torch.nn.Module,
    rows: TieredRows,
    representations: Representations | None,
    *,
    num_dense: int,
    layout: SlotLayout,
) -> TrainStep:
    kind: Literal["sgd", "adagrad"] = "sgd" if config.optimizer == "sgd" else "adagrad"
    optimizer = DenseOptimizer(model.parameters(), kind=kind, eps=config.eps, weight_decay=config.weight_decay)
    options: dict[str, Any] = {
        "model": model,
        "rows": rows,
        "dense_optimizer": optimizer,
        "eps": config.eps,
        "precision": config.precision,
        "kernels": config.kernels,
        "representations": representations,
        "most_distinct": layout.most_distinct(config.batch_size),
    }
    has_cores = representations is not None and representations.has_cores
    if rows.device.type == "cuda" and not config.deterministic and not config.faithful and not has_cores:
        num_tables = len(layout.column_tables)
        return FixedShapeStep(batch_size=config.batch_size, num_dense=num_dense, num_tables=num_tables, **options)
    return TrainStep(deterministic=config.deterministic, **options)


def _init_rows(rows: TieredRows, layout: SlotLayout, padding_rows: Mapping[str, int], *, seed: int) -> None:
    """Draw initial weights table by table, so that they do not depend on what is hot; padding rows are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name in layout.inside:
        slots = layout.slot_maps[name]
        bound = len(slots) ** -0.5
        weights = torch.empty(len(slots), rows.embedding_dim).uniform_(-bound, bound, generator=generator)
        if name in padding_rows:
            weights[padding_rows[name]] = 0.0
        rows.load(torch.from_numpy(slots), weights)


def _skip_rule(config: SkipConfig, criterion: Criterion, *, num_rows: int, num_dense: int) -> SkipRule:
    return SkipRule(
        criterion=criterion,
        target_drop=config.target_drop,
        scope=config.scope,
        movement=config.movement,
        alpha=config.alpha,
        threshold=config.threshold,
        sample_size=config.sample_size,
        num_rows=num_rows if config.scorer == "linear" else 0,
        num_dense=num_dense,
        floor=config.floor,
        reweight=config.reweight,
    )


def _schedule(config: TrainConfig, skip_config: SkipConfig, num_train: int, seed: int) -> Schedule:
    return Schedule(
        epochs=config.epochs,
        batch_size=config.batch_size,
        order=config.order,
        segment_steps=skip_config.refresh_steps or default_segment_steps(num_train, config.batch_size),
        round_samples=_ROUND_SAMPLES,
        warmup_steps=skip_config.warmup_steps,
        window_steps=skip_config.window_steps,
        seed=seed,
    )


def _lr_schedule(config: TrainConfig) -> Callable[[float], float]:
    def learning_rate(progress: float) -> float:
        warm = min(1.0, progress / config.lr_warmup) if config.lr_warmup else 1.0
        decay = 1.0 - progress if config.lr_decay == "linear" else 1.0
        return config.lr * warm * decay

    return learning_rate


def _open_stream(
    segregated: Artifact, group: str, layout: SlotLayout, *, seed: tuple[int, int], workers: ThreadPoolExecutor
) -> SampleStream:
    paths = segregated.files(f"{group}/", ".npz")

    def loader(path: Path) -> Callable[[], Samples]:
        return lambda: layout.translate(read_shard(segregated.check(path)))

    per_shard = segregated.manifest["config"]["samples_per_shard"]
    total = segregated.counts["samples"][group]
    return SampleStream(
        [loader(path) for path in paths],
        [min(per_shard, total - index * per_shard) for index in range(len(paths))],
        seed=(*seed, len(group)),
        window_samples=_WINDOW_SAMPLES,
        workers=workers,
    )


def _listener(events: SummaryWriter, advance: Callable[[int, str], None]) -> Callable[[StepReport], None]:
    shown = 0

    def listen(report: StepReport) -> None:
        nonlocal shown
        events.add_scalar("train/loss", report.loss, report.step)
        events.add_scalar("train/samples_per_second", report.samples_per_second, report.step)
        events.add_scalar("train/samples_dropped", report.samples_dropped, report.step)
        if report.threshold is not None:
            events.add_scalar("train/threshold", report.threshold, report.step)
        done = report.samples_seen + report.samples_dropped
        skipped = f"  skipped {report.samples_dropped / done:.0%}" if report.samples_dropped else ""
        advance(done - shown, f"loss {report.loss:.4f}  {report.samples_per_second:,.0f} samples/s{skipped}")
        shown = done

    return listen


def _read_slot_maps(segregated: Artifact) -> dict[str, np.ndarray]:
    path = segregated.check(segregated.path / "slots.npz")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in segregated.counts["tables"]}


def _train_faithfully(
    config: TrainConfig,
    skip_config: SkipConfig,
    criterion: Criterion,
    segregated: Artifact,
    step: TrainStep,
    open_streams: Callable[[int], dict[str, SampleStream]],
    seed: int,
) -> dict[str, Any]:
    rule = FaithfulRule(
        target_drop=skip_config.target_drop if criterion == "stale" else 0.0,
        alpha=skip_config.alpha,
        first_snapshot=skip_config.warmup_steps,
        sample_size=skip_config.sample_size,
    )
    trainer = FaithfulTrainer(
        step=step,
        num_hot=segregated.counts["hot_rows"],
        rule=rule,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=seed,
    )
    trainer.train(open_streams, epochs=config.epochs)
    return _common_figures(
        trainer.totals,
        trainer.lookahead,
        classified=trainer.classified,
        dropped=trainer.dropped,
        asked=rule.target_drop,
        threshold=trainer.threshold,
    ) | {
        "bytes_per_tier": trainer.bytes_per_tier(),
        "sync_bytes": trainer.sync_bytes,
        "sync_seconds": trainer.sync_seconds,
    }


def _figures(trainer: Trainer, placement: Placement) -> dict[str, Any]:
    skipper = trainer.skipper
    figures = _common_figures(
        trainer.totals,
        trainer.lookahead,
        classified=skipper.classified,
        dropped=skipper.dropped,
        asked=skipper.rule.target_drop if skipper.rule.criterion != "none" else 0.0,
        threshold=skipper.threshold,
    )
    figures["bytes_per_tier"] = trainer.step.rows.bytes_per_tier() | trainer.tracker_bytes()
    representations = trainer.step.representations
    if representations is not None and representations.has_cores:
        figures["bytes_per_tier"]["tt"] = representations.core_bytes()
    if isinstance(placement, CachedRows):
        figures["hit_ratio"] = placement.cache.stats.hit_ratio
    return figures


def _common_figures(
    totals: LoopTotals,
    lookahead: LookAhead,
    *,
    classified: int,
    dropped: int,
    asked: float,
    threshold: float | None,
) -> dict[str, Any]:
    return {
        "steps": totals.steps,
        "hot_steps": totals.hot_steps,
        "samples_seen": totals.samples_seen,
        "samples_dropped": dropped,
        "samples_classified": classified,
        "drop_asked": asked,
        "drop_achieved": dropped / classified if classified else 0.0,
        "threshold": threshold,
        "samples_per_second": totals.samples_seen / totals.seconds,
        "train_seconds": totals.seconds,
        "bytes_to_device": lookahead.bytes_to_device,
        "bytes_to_host": lookahead.bytes_to_host,
        "hit_ratio": 1 - lookahead.cold_lookups / max(lookahead.lookups, 1),
    }


def _evaluate(
    step: TrainStep,
    segregated: Artifact,
    layout: SlotLayout,
    scratch: Path,
    events: SummaryWriter,
    *,
    at_step: int,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    quality = {}
    for split in ("test", "val"):
        paths = segregated.files(f"{split}/", ".npz")
        shards = (layout.translate(read_shard(segregated.check(path))) for path in paths)
        predicted, labels = predict(
            step.model, step.rows, shards, batch_size=batch_size, representations=step.representations
        )
        quality[split] = asdict(measure_quality(labels, predicted))
        for name, value in quality[split].items():
            events.add_scalar(f"{split}/{name}", value, at_step)
        with write_atomically(scratch / f"predictions_{split}.npy") as path, path.open("wb") as stream:
            np.save(stream, predicted)
    return quality
