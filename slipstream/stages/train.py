"""Train: shards to a model, with hot rows on the device and cold rows on the host.

Reads   segregate/   hot, cold, val and test shards, slots.npz
Writes  train/       model.safetensors, model.json, vocab/: the whole model
                     predictions_{val,test}.npy, staleness.json, losses.json, events/
Keeps   each row in one place; over the same batch order every exact mode ends with the same model
Costs   one pass over the training shards an epoch; device memory for hot rows, staging and what watches rows move
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from slipstream.config import PipelineConfig, TrainConfig
from slipstream.distributed.ranks import ALONE, Alone, Ranks
from slipstream.embedding.tiers.placement import CachedRows
from slipstream.errors import ArtifactError, ConfigError, TrainingError
from slipstream.io.artifacts import Artifact, hash_file, link_or_copy, write_atomically, write_json
from slipstream.io.capacity import is_in_memory, on_same_disk, require_disk, require_memory, written_bytes
from slipstream.io.costs import train_disk_bytes, train_memory_bytes
from slipstream.io.counts import read_counts
from slipstream.io.figures import PreprocessFigures, SegregateFigures, TrainFigures
from slipstream.io.model_folder import FILES, WEIGHTS
from slipstream.ops.metrics import Quality, measure_quality
from slipstream.ops.plausibility import doubt_quality
from slipstream.options import to_dict
from slipstream.serving.encoder import describe_encoding, write_vocabularies
from slipstream.serving.examples import write_examples
from slipstream.serving.warm_start import start_from
from slipstream.stage import StageJob, trained_row_bytes
from slipstream.training.assemble import Assembly
from slipstream.training.checkpoint import Checkpointer
from slipstream.training.device import check_kernels, fitting_the_device, resolve_device
from slipstream.training.faithful import FaithfulRule, FaithfulTrainer
from slipstream.training.loop import LoopTotals, StepReport, Trainer
from slipstream.training.model_file import load_model, save_model
from slipstream.training.order.shards import Shards, read_slot_maps
from slipstream.training.pooling import describe_bags
from slipstream.training.predict import predict
from slipstream.training.representations import TableSpec, lay_out, weigh_mixed
from slipstream.training.shared_step import SharedStep, require_same_model
from slipstream.training.skipping.registry import CRITERIA
from slipstream.training.threads import torch_threads
from slipstream.training.validation import Validation
from slipstream.wiring import alpha_tables_of, choose_tables, make_trainer, num_threads, put_together

_log = logging.getLogger(__name__)
_BEST = Path("work", "best")
"""Where the best model so far is, below the scratch folder."""


def run_stage(job: StageJob) -> TrainFigures:
    """Train and evaluate; goes on from a checkpoint in the scratch folder where there is one.

    Returns:
        Metrics, samples seen and dropped, throughput, bytes per tier.
    """
    config, scratch, ranks = job.config, job.scratch, job.ranks or ALONE
    processed, segregated = job.inputs["preprocess"], job.inputs["segregate"]
    if isinstance(ranks, Ranks):
        ranks.count_anew()
    if ranks.leads:
        write_vocabularies(processed, scratch)
        write_examples(processed, scratch)
    parts = _open(config, segregated, counts=read_counts(job.inputs["profile"]), scratch=scratch, ranks=ranks)
    shards = Shards(segregated, parts.layout)
    start = None
    if config.train.init_from:
        padding_rows = shards.figures.padding_rows or {}
        start = start_from(Path(config.train.init_from), parts, processed=processed, padding_rows=padding_rows)
    checkpoints = Checkpointer(
        scratch / "work",
        fingerprint=job.key.fingerprint,
        every_steps=config.train.checkpoint_steps,
        every_minutes=config.train.checkpoint_minutes,
        ranks=ranks,
    )
    label = "train" if ranks.size == 1 else f"train, {ranks.size} ranks"
    # rows last: a checkpoint may still be written from them
    with (
        closing(parts.rows),
        _open_events(scratch, ranks) as events,
        checkpoints,
        torch_threads(num_threads(config, parts)),
    ):
        with (
            shards.streams(seed=config.train_seed) as open_streams,
            job.progress.task(label, shards.figures.num_train * config.train.epochs, "samples") as advance,
        ):
            listener = _Listener(events, advance)
            validation = _make_validation(job, parts, shards, processed, scratch, ranks) if config.validates else None
            trainer = _make_trainer(config, parts, shards, checkpoints, validation, on_report=listener)
            with fitting_the_device(lambda: f"step {trainer.totals.steps + 1}, of {config.train.batch_size:,} samples"):
                if isinstance(trainer, FaithfulTrainer):
                    trainer.train(open_streams)
                else:
                    if checkpoints.restore(trainer):
                        listener.resume(trainer.totals)
                    checkpoints.train(trainer, open_streams)
        require_same_model(parts.step)
        out = scratch if ranks.leads else None
        if out is not None:
            _note(trainer, out)
        if validation is None or validation.best is None or validation.best.step == trainer.totals.steps:
            with trainer.step.serving():
                quality = _evaluate(config, shards, out, parts.model, parts.step.look_up, ranks)
                _save(config, parts, processed, out)
        else:
            quality = _take_best(config, parts, shards, validation, out, ranks)
        _add_events(events, quality, validation, step=trainer.totals.steps)
    return replace(_sum_up(config, parts, trainer, quality, validation), start=start)


class _NoEvents:
    """Stands in for a TensorBoard writer on ranks that write none."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Take a point."""


def _open_events(scratch: Path, ranks: Alone) -> AbstractContextManager[SummaryWriter | _NoEvents]:
    return SummaryWriter(str(scratch / "events")) if ranks.leads else nullcontext(_NoEvents())


def _open(config: PipelineConfig, segregated: Artifact, *, counts: np.ndarray, scratch: Path, ranks: Alone) -> Assembly:
    """Put together what trains."""
    device = resolve_device(config.train.device)
    check_kernels(config.train.kernels, device)
    figures = SegregateFigures.of(segregated)
    specs = choose_tables(config, figures, counts)
    _check_capacity(config, figures, specs, scratch, on_host=device.type == "cpu")
    layout = lay_out(read_slot_maps(segregated), specs, num_hot=figures.hot_rows, table_of_column=figures.column_tables)
    if CRITERIA.get(config.criterion).watches_rows and not layout.tiered:
        raise ConfigError(
            f"criterion `{config.criterion}` watches rows move, and no table has rows: all are tensor-train cores",
            hint="choose another skip.criterion, or let small tables be dense",
        )
    return put_together(
        config,
        layout=layout,
        specs=specs,
        figures=figures,
        counts=counts,
        device=device,
        ranks=ranks if isinstance(ranks, Ranks) else None,
    )


def _check_capacity(
    config: PipelineConfig, figures: SegregateFigures, specs: Sequence[TableSpec], scratch: Path, *, on_host: bool
) -> None:
    """Refuse what cannot fit, before the first table is made.

    Raises:
        CapacityError: Memory or disk would not do.
    """
    row_bytes = trained_row_bytes(config)
    num_rows = sum(spec.num_held for spec in specs)
    table_bytes = num_rows * row_bytes
    in_tier = 0 if config.train.mode in ("baseline", "cached") else min(figures.hot_rows, num_rows) * row_bytes
    in_file = table_bytes - in_tier if config.train.cold_path else 0
    on_device = 0 if on_host else min(figures.hot_rows, num_rows) * row_bytes
    sample_bytes = 4 * (len(figures.column_tables) + figures.num_dense + 1)
    require_memory(
        train_memory_bytes(max(0, table_bytes - on_device - in_file), figures.num_train, sample_bytes=sample_bytes),
        purpose="train",
        hint="keep cold rows on a disk with `train.cold_path`, lower `model.embedding_dim`, or make the vocabulary "
        "smaller: raise `preprocess.freq_threshold`",
    )
    keeps_checkpoints = bool(config.train.checkpoint_steps or config.train.checkpoint_minutes)
    model_bytes = (
        train_disk_bytes(table_bytes, keeps_checkpoints=keeps_checkpoints and not config.train.faithful)
        + (table_bytes if config.validates else 0)
        - written_bytes(scratch)
    )
    if in_file:
        folder = Path(config.train.cold_path)
        if is_in_memory(folder):
            _log.warning(f"`train.cold_path` = '{folder}' is on tmpfs, which is memory: choose a folder on a disk")
        beside = model_bytes if on_same_disk(folder, scratch) else 0
        require_disk(
            folder,
            in_file + beside,
            purpose="the cold tier of `train.cold_path`"
            + (", with what train writes to the same disk," if beside else ""),
            hint="free some disk, or set `train.cold_path` to a folder on a larger one",
        )
    require_disk(
        scratch,
        model_bytes,
        purpose="train, its model and two checkpoints," if keeps_checkpoints else "train",
        hint="free some disk, choose a folder on a larger one with --runs, or do without checkpoints: "
        "`train.checkpoint_minutes = 0`",
    )


def _make_trainer(
    config: PipelineConfig,
    parts: Assembly,
    shards: Shards,
    checkpoints: Checkpointer,
    validation: Validation | None,
    *,
    on_report: Callable[[StepReport], None],
) -> Trainer | FaithfulTrainer:
    """Make what trains: the loop that every mode shares, or the published order."""
    if config.train.faithful:
        return _make_faithful(config, parts, num_hot=shards.figures.hot_rows)
    with fitting_the_device("what watches the hot rows move"):
        return make_trainer(
            config,
            parts,
            num_train=shards.figures.num_train,
            on_report=on_report,
            between_chunks=checkpoints.between_chunks,
            validation=validation,
        )


def _make_validation(
    job: StageJob, parts: Assembly, shards: Shards, processed: Artifact, scratch: Path, ranks: Alone
) -> Validation:
    """Make what measures the model on the way, and keeps the best in the folder of work; all ranks go by the first."""
    config, folder = job.config, scratch / _BEST

    def measure() -> Quality:
        predicted, labels = _predict(config, shards, "val", parts.model, parts.step.look_up, ranks)
        if not np.isfinite(predicted).all():
            raise TrainingError("the model predicts no numbers on validation data", hint="lower `train.lr`")
        return _from_first(ranks, measure_quality(labels, predicted))

    def keep() -> str:
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
        _save(config, parts, processed, folder if ranks.leads else None)
        return hash_file(folder / WEIGHTS) if ranks.leads else ""

    return Validation(
        every_steps=config.train.validate_steps,
        patience=config.train.patience,
        measure=measure,
        keep=keep,
        on_measured=job.progress.measured,
    )


def _from_first(ranks: Alone, quality: Quality) -> Quality:
    """Give what the first rank measured, on every rank."""
    if not isinstance(ranks, Ranks):
        return quality
    return Quality(**ranks.share(asdict(quality) if ranks.leads else None, "what the first rank measured"))


def _take_best(
    config: PipelineConfig, parts: Assembly, shards: Shards, validation: Validation, out: Path | None, ranks: Alone
) -> dict[str, Quality]:
    """Publish the model that was kept, and evaluate it from its files, on the first rank; the others hear of it.

    Raises:
        ArtifactError: They are not what was kept.
    """
    if out is None:
        assert validation.best is not None
        return {split: _from_first(ranks, validation.best.quality) for split in ("test", "val")}
    folder = out / _BEST
    if not (folder / WEIGHTS).exists() or hash_file(folder / WEIGHTS) != validation.best_hash:
        raise ArtifactError(
            f"expected the best model in `{folder}`, found another one or none",
            hint="train again: `slipstream train --force`",
        )
    for name in FILES:
        link_or_copy(folder / name, out / name)
    model, tables = load_model(out)
    row_of_slot = np.empty(parts.layout.num_slots, np.int64)
    for slots in parts.layout.slot_maps.values():
        row_of_slot[slots] = np.arange(len(slots))

    def look_up(slots: np.ndarray) -> Tensor:
        return tables.look_up(torch.from_numpy(row_of_slot[slots]))

    quality = _evaluate(config, shards, out, model, look_up)
    return {split: _from_first(ranks, quality[split]) for split in ("test", "val")}


def _add_events(
    events: SummaryWriter | _NoEvents, quality: dict[str, Quality], validation: Validation | None, *, step: int
) -> None:
    """Give TensorBoard what was measured, on the way and at the end."""
    measured = [("test", step, quality["test"])]
    if validation is None:
        measured.append(("val", step, quality["val"]))
    else:
        measured += [("val", check.step, check.quality) for check in validation.checks]
    for split, after, found in measured:
        for name, value in asdict(found).items():
            events.add_scalar(f"{split}/{name}", value, after)


def _make_faithful(config: PipelineConfig, parts: Assembly, *, num_hot: int) -> FaithfulTrainer:
    rule = FaithfulRule(
        target_drop=config.skip.target_drop if CRITERIA.get(config.criterion).drops else 0.0,
        alpha=config.skip.alpha,
        alpha_tables=alpha_tables_of(config, parts),
        first_snapshot=config.skip.warmup_steps,
        sample_size=config.skip.sample_size,
        sample_ratio=config.skip.sample_ratio,
        probe_share=config.skip.probe_share,
        tolerance=config.skip.tolerance,
    )
    with fitting_the_device("the second copy of the hot rows"):
        return FaithfulTrainer(
            step=parts.step,
            num_hot=num_hot,
            rule=rule,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            lr=config.train.lr,
            seed=config.train_seed,
            padding_slots=parts.padding_slots,
        )


class _Listener:
    """Passes reports on to TensorBoard and to whoever watches."""

    def __init__(self, events: SummaryWriter | _NoEvents, advance: Callable[[int, str], None]) -> None:
        self._events, self._advance = events, advance
        self._shown = 0

    def resume(self, totals: LoopTotals) -> None:
        """Show at once where a training stands that goes on."""
        self._shown = totals.samples_seen + totals.samples_dropped
        self._advance(self._shown, f"from step {totals.steps:,}")

    def __call__(self, report: StepReport) -> None:
        """Hear a report."""
        events = self._events
        events.add_scalar("train/loss", report.loss, report.step)
        events.add_scalar("train/samples_per_second", report.samples_per_second, report.step)
        events.add_scalar("train/samples_dropped", report.samples_dropped, report.step)
        dropped_per_second = report.samples_per_second * report.samples_dropped / report.samples_seen
        events.add_scalar("train/samples_dropped_per_second", dropped_per_second, report.step)
        if report.threshold is not None:
            events.add_scalar("train/threshold", report.threshold, report.step)
        done = report.samples_seen + report.samples_dropped
        skipped = f"  skipped {report.samples_dropped / done:.0%}" if report.samples_dropped else ""
        self._advance(
            done - self._shown, f"loss {report.loss:.4f}  {report.samples_per_second:,.0f} samples/s{skipped}"
        )
        self._shown = done


def _predict(
    config: PipelineConfig,
    shards: Shards,
    split: str,
    model: nn.Module,
    look_up: Callable[[np.ndarray], Tensor],
    ranks: Alone,
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels) of a split, of which each rank predicts its part."""
    batch_size = config.train.eval_batch_size
    with fitting_the_device(f"evaluation in batches of {batch_size:,}", lower="`train.eval_batch_size`"):
        return predict(
            model,
            look_up,
            shards.split(split),
            batch_size=batch_size,
            num_threads=config.train.num_threads,
            ranks=ranks,
        )


def _evaluate(
    config: PipelineConfig,
    shards: Shards,
    out: Path | None,
    model: nn.Module,
    look_up: Callable[[np.ndarray], Tensor],
    ranks: Alone = ALONE,
) -> dict[str, Quality]:
    """Predict test and validation data, and keep what was predicted where this rank is the one that writes."""
    quality = {}
    for split in ("test", "val"):
        predicted, labels = _predict(config, shards, split, model, look_up, ranks)
        quality[split] = measure_quality(labels, predicted)
        if out is not None:
            with write_atomically(out / f"predictions_{split}.npy") as path, path.open("wb") as stream:
                np.save(stream, predicted)
    return quality


def _note(trainer: Trainer | FaithfulTrainer, scratch: Path) -> None:
    """Write what the loop noted on the way."""
    if isinstance(trainer, Trainer):
        write_json(scratch / "staleness.json", [asdict(check) for check in trainer.skipper.checks])
        write_json(scratch / "losses.json", trainer.totals.losses)


def _save(config: PipelineConfig, parts: Assembly, processed: Artifact, out: Path | None) -> None:
    """Write the model as it is served; ranks that do not, help."""
    layout, bags = parts.layout, parts.representations.pooling.bags
    description = {
        "num_dense": parts.num_dense,
        "tables": {name: len(slots) for name, slots in layout.slot_maps.items()},
        "column_tables": layout.column_tables,
        "quantize_linears": config.tables.quantize_linears,
        **({"quantize_biases": True} if config.tables.quantize_biases else {}),
        "encoding": describe_encoding(processed).to_json(),
        **to_dict(config.model),
    }
    if bags:
        padding_rows = PreprocessFigures.of(processed).padding_rows or {}
        description["bags"] = describe_bags(bags, layout.column_tables, padding_rows)
    save_model(
        out,
        model=parts.model,
        rows=parts.rows,
        slot_maps=layout.slot_maps,
        description=description,
        representations=parts.representations,
    )


def _sum_up(
    config: PipelineConfig,
    parts: Assembly,
    trainer: Trainer | FaithfulTrainer,
    quality: dict[str, Quality],
    validation: Validation | None,
) -> TrainFigures:
    fit = trainer.figures()
    if isinstance(parts.placement, CachedRows):
        fit = replace(fit, hit_ratio=parts.placement.cache.stats.hit_ratio)
    best_step = None if validation is None or validation.best is None else validation.best.step
    if best_step is not None and fit.averaged_steps is not None:
        # averaged steps are the last ones, so the kept model has those of them up to its own
        fit = replace(fit, averaged_steps=max(0, best_step - (fit.steps - fit.averaged_steps)))
    exchanged: dict[str, Any] = {}
    if isinstance(parts.step, SharedStep):
        exchanged = parts.step.sums.ranks.figures(steps=fit.steps)
    return TrainFigures(
        **exchanged,
        test=quality["test"],
        val=quality["val"],
        device=parts.rows.device.type,
        validations=[] if validation is None else validation.checks,
        mixed=weigh_mixed(parts.representations.specs, parts.rows.embedding_dim),
        best_step=best_step,
        stopped_early=None if validation is None else validation.says_stop,
        **asdict(fit),
        warnings=[
            *_doubt_cache(config.train, parts),
            *doubt_quality({split: measured.ne for split, measured in quality.items()}),
        ],
    )


def _doubt_cache(config: TrainConfig, parts: Assembly) -> list[str]:
    """Say where mode `cached` holds more rows than it was asked to."""
    asked, rows = int(parts.layout.num_rows * config.cache_ratio), parts.rows.num_staged
    if config.mode != "cached" or rows <= asked:
        return []
    return [
        f"the cache holds {rows:,} rows ({rows / parts.layout.num_rows:.1%}), not the {asked:,} of `train.cache_ratio` "
        f"= {config.cache_ratio:g}: two batches of {config.batch_size:,} can look up as many; lower `train.batch_size` "
        "for a smaller cache"
    ]
