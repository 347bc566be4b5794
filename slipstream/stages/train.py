"""Train: shards to a model, with hot rows on the device and cold rows on the host.

Reads   segregate/   hot, cold, val and test shards, slots.npz
Writes  train/       model.safetensors, model.json, predictions_{val,test}.npy, staleness.json, losses.json, events/
Keeps   each row in one place; over the same batch order every exact mode ends with the same model
Costs   one pass over the training shards an epoch; device memory for hot rows, staging and one snapshot
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from slipstream.config import ModelConfig, SkipConfig, TrainConfig
from slipstream.embedding.lookahead import LookAhead
from slipstream.embedding.tiers import TieredRows
from slipstream.errors import CapacityError, ConfigError
from slipstream.io.artifacts import Artifact, write_atomically, write_json
from slipstream.io.samples import Samples, read_shard
from slipstream.models.dlrm import DLRM
from slipstream.ops.metrics import measure_quality
from slipstream.progress import Progress
from slipstream.training.checkpoint import save_model
from slipstream.training.loop import StepReport, Trainer
from slipstream.training.schedule import default_segment_steps
from slipstream.training.skipping import Criterion, Skipper
from slipstream.training.stream import SampleStream

_WINDOW_SAMPLES = 2_000_000
"""Samples shuffled together, and the most samples of a round."""
_STAGING_CAP = 1 << 19
"""Rows a staging half holds by default, unless one batch needs more."""


def run(
    config: TrainConfig,
    *,
    model_config: ModelConfig,
    skip_config: SkipConfig,
    criterion: Criterion,
    segregated: Artifact,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        config: Section `train`.
        model_config: Section `model`.
        skip_config: Section `skip`.
        criterion: The skip criterion in force.
        segregated: The segregate artifact.
        seed: Of initial weights, batch order and dropping.
        scratch: Folder to write to.
        progress: Told how far it is.

    Returns:
        Counts for the manifest: metrics, samples seen and dropped, throughput, bytes per tier.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = resolve_device(config.device)
    sizes: dict[str, int] = segregated.counts["samples"]
    num_dense: int = segregated.counts["num_dense"]
    slot_maps = _read_slot_maps(segregated)
    rows = _make_rows(config, model_config, segregated, slot_maps, device=device, seed=seed)
    torch.manual_seed(seed)
    model = DLRM(
        num_dense=num_dense,
        num_tables=len(slot_maps),
        embedding_dim=model_config.embedding_dim,
        bottom_mlp=model_config.bottom_mlp,
        top_mlp=model_config.top_mlp,
    ).to(device)
    skipper = Skipper(
        criterion=criterion,
        target_drop=skip_config.target_drop,
        alpha=skip_config.alpha,
        threshold=skip_config.threshold,
        sample_size=skip_config.sample_size,
    )
    lookahead = LookAhead(rows, chunk_batches=1 if config.mode == "baseline" else config.chunk_batches)
    num_train = sizes["hot"] + sizes["cold"]
    total = num_train * config.epochs
    with (
        SummaryWriter(str(scratch / "events")) as events,
        progress.task("train", total, "samples") as advance,
    ):
        trainer = Trainer(
            model=model,
            rows=rows,
            lookahead=lookahead,
            dense_optimizer=_dense_optimizer(config, model),
            lr_schedule=_lr_schedule(config),
            eps=config.eps,
            skipper=skipper,
            log_every=config.log_every,
            on_report=_listener(events, advance),
        )
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="shards") as workers:
            for epoch in range(config.epochs):
                streams = {
                    group: _open_stream(segregated, group, seed=(seed, epoch), workers=workers)
                    for group in ("hot", "cold")
                }
                trainer.train_epoch(
                    streams,
                    batch_size=config.batch_size,
                    order=config.order,
                    segment_steps=skip_config.refresh_steps or default_segment_steps(num_train, config.batch_size),
                    round_samples=_WINDOW_SAMPLES,
                    warmup_steps=skip_config.warmup_steps,
                    window_steps=skip_config.window_steps,
                    rng=np.random.default_rng([seed, epoch, len(streams)]),
                    epoch_span=(epoch / config.epochs, (epoch + 1) / config.epochs),
                )
        quality = {}
        for split in ("test", "val"):
            shards = (read_shard(segregated.check(path)) for path in segregated.files(f"{split}/", ".npz"))
            predicted, labels = trainer.predict(shards, batch_size=config.eval_batch_size)
            quality[split] = asdict(measure_quality(labels, predicted))
            for name, value in quality[split].items():
                events.add_scalar(f"{split}/{name}", value, trainer.totals.steps)
            with write_atomically(scratch / f"predictions_{split}.npy") as path, path.open("wb") as stream:
                np.save(stream, predicted)
    save_model(
        scratch,
        model=model,
        rows=rows,
        slot_maps=slot_maps,
        description={"num_dense": num_dense, "tables": segregated.counts["tables"], **_plain(model_config)},
    )
    write_json(scratch / "staleness.json", [asdict(check) for check in skipper.checks])
    write_json(scratch / "losses.json", trainer.totals.losses)
    return _summarise(trainer, skipper, lookahead, rows, quality, device=device, criterion=criterion)


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


def _make_rows(
    config: TrainConfig,
    model_config: ModelConfig,
    segregated: Artifact,
    slot_maps: dict[str, np.ndarray],
    *,
    device: torch.device,
    seed: int,
) -> TieredRows:
    num_rows: int = segregated.counts["rows"]
    placement = {"resident": num_rows, "baseline": 0}
    num_hot = placement.get(config.mode, segregated.counts["hot_rows"])
    lookups = config.batch_size * len(slot_maps)
    staging = config.staging_rows or max(lookups, min(config.chunk_batches * lookups, _STAGING_CAP))
    try:
        rows = TieredRows(
            num_rows=num_rows,
            num_hot=num_hot,
            embedding_dim=model_config.embedding_dim,
            staging_rows=staging,
            optimizer=config.optimizer,
            device=device,
        )
    except torch.cuda.OutOfMemoryError as exc:
        raise CapacityError(
            f"{num_hot:,} hot rows and 2 x {staging:,} staging rows of {model_config.embedding_dim} floats do "
            f"not fit the device: {exc}",
            hint="lower `segregate.hot_budget` or `train.staging_rows`",
        ) from exc
    # drawn table by table, so that the initial model does not depend on what is hot
    generator = torch.Generator().manual_seed(seed)
    for slots in slot_maps.values():
        bound = len(slots) ** -0.5
        weights = torch.empty(len(slots), model_config.embedding_dim)
        rows.load(torch.from_numpy(slots), weights.uniform_(-bound, bound, generator=generator))
    return rows


def _lr_schedule(config: TrainConfig) -> Callable[[float], float]:
    def learning_rate(progress: float) -> float:
        warm = min(1.0, progress / config.lr_warmup) if config.lr_warmup else 1.0
        decay = 1.0 - progress if config.lr_decay == "linear" else 1.0
        return config.lr * warm * decay

    return learning_rate


def _dense_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.Adagrad(
        model.parameters(),
        lr=config.lr,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def _open_stream(
    segregated: Artifact, group: str, *, seed: tuple[int, int], workers: ThreadPoolExecutor
) -> SampleStream:
    paths = segregated.files(f"{group}/", ".npz")

    def loader(path: Path) -> Callable[[], Samples]:
        return lambda: read_shard(segregated.check(path))

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


def _plain(config: ModelConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def _summarise(
    trainer: Trainer,
    skipper: Skipper,
    lookahead: LookAhead,
    rows: TieredRows,
    quality: dict[str, dict[str, float]],
    *,
    device: torch.device,
    criterion: Criterion,
) -> dict[str, Any]:
    totals = trainer.totals
    return {
        **quality,
        "device": device.type,
        "steps": totals.steps,
        "hot_steps": totals.hot_steps,
        "samples_seen": totals.samples_seen,
        "samples_dropped": skipper.dropped,
        "samples_classified": skipper.classified,
        "drop_asked": skipper.target_drop if criterion != "none" else 0.0,
        "drop_achieved": skipper.dropped / skipper.classified if skipper.classified else 0.0,
        "threshold": skipper.threshold,
        "samples_per_second": totals.samples_seen / totals.seconds,
        "train_seconds": totals.seconds,
        "bytes_per_tier": rows.bytes_per_tier(),
        "bytes_to_device": lookahead.bytes_to_device,
        "bytes_to_host": lookahead.bytes_to_host,
        "hit_ratio": 1 - lookahead.cold_lookups / max(lookahead.lookups, 1),
    }
