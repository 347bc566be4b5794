"""Compare: one pipeline, a grid of modes and skip criteria, several seeds, paired differences.

Every cell is an ordinary run of the pipeline, so what is done already is not done again and a comparison that was
interrupted goes on. Only `train.seed` changes between seeds: all cells see the same samples, hot set and initial
weights per seed, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from slipstream.config import PipelineConfig, load_pipeline
from slipstream.errors import ConfigError
from slipstream.io.figures import FiguresT, SegregateFigures, TrainFigures
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.progress import Progress
from slipstream.training.skipping.registry import CRITERIA


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the grid."""

    name: str
    overrides: tuple[str, ...]
    final: tuple[str, ...] = ()
    """Overrides that hold whatever the user sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and spread of a figure over seeds."""

    mean: float
    error: float
    """Standard error of the mean; 0 for one seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedVariant:
    """Figures of one variant over all seeds."""

    name: str
    overrides: tuple[str, ...]
    figures: dict[str, Spread]
    """By name: seconds, cpu_seconds, samples_per_second, samples_seen, skipped_share, test and val metrics, auc (mean
    of test and val), auc_change (paired against the first variant), hit_ratio, bytes."""
    seeds: int


def make_grid(modes: Sequence[str], criteria: Sequence[str], vary: Sequence[str]) -> list[Variant]:
    """All combinations to run.

    Args:
        modes: Values of train.mode, without skipping.
        criteria: Values of skip.criterion, each with mode `slipstream` and the widest scope that it has; `all` stands
            for every one that drops anything.
        vary: `key=value,value,…`; every combination of them with every mode and criterion.

    Where a criterion drops samples, `random` is there too: the control of every claim.

    Raises:
        ConfigError: A `vary` is not of that form, or the grid is empty.
    """
    bases: list[tuple[str, tuple[str, ...]]] = [(mode, (f"train.mode={mode}",)) for mode in modes]
    for name in _with_control(_every_criterion() if list(criteria) == ["all"] else criteria):
        if name not in CRITERIA.names():
            raise ConfigError(
                f"expected criteria among {', '.join(CRITERIA.names())}, found `{name}`", hint="look at --criteria"
            )
        scope = CRITERIA.get(name).scopes[-1]
        bases.append((name, ("train.mode=slipstream", f"skip.criterion={name}", f"skip.scope={scope}")))
    axes = []
    for axis in vary:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise ConfigError(
                f"expected `--vary key=value,value`, found `{axis}`", hint="for example --vary train.lr=0.01,0.02"
            )
        axes.append([f"{key}={value}" for value in values.split(",")])
    grid = [
        Variant(name=" ".join((name, *extra)), overrides=(*overrides, *extra))
        for (name, overrides), extra in product(bases, product(*axes))
    ]
    if not grid:
        raise ConfigError("nothing to compare", hint="name at least one of --modes and --criteria")
    return grid


def _with_control(criteria: Sequence[str]) -> list[str]:
    """Add `random`, the control, before the first criterion that drops anything."""
    known = [name in CRITERIA.names() and CRITERIA.get(name).drops for name in criteria]
    if "random" in criteria or not any(known):
        return list(criteria)
    first = known.index(True)
    return [*criteria[:first], "random", *criteria[first:]]


def _every_criterion() -> list[str]:
    return [name for name in CRITERIA.names() if CRITERIA.get(name).drops]


def run_comparison(
    path: Path,
    runs_dir: Path,
    *,
    grid: Sequence[Variant],
    overrides: Sequence[str],
    seeds: int,
    skip_share: float | None,
    progress: Progress,
    on_run: Callable[[str, int], None] = lambda name, seed: None,
) -> list[ComparedVariant]:
    """Run every variant with every seed, seed by seed.

    Beside criteria that leave out a share of all samples stands what takes as few steps without leaving any out:
    batches of B / (1 - share).

    Args:
        path: Pipeline file.
        runs_dir: Folder that holds run folders.
        grid: Variants; differences are against the first.
        overrides: Apply to all of them.
        seeds: Number of seeds, 0, 1, ….
        skip_share: Share of all samples to skip; sets each criterion's D so that all skip as many. None leaves D.
        progress: Told how far each stage is.
        on_run: Told which cell comes next.
    """
    grid = [*grid, *_larger_batches(path, runs_dir, grid, overrides, skip_share, progress)]
    trained: list[list[TrainFigures]] = [[] for _ in grid]
    hot_rows: set[int] = set()
    # all variants of a seed in a row: a machine that gets slower over hours meets every variant alike
    for seed in range(seeds):
        for variant, cells in zip(grid, trained, strict=True):
            on_run(variant.name, seed)
            # what the user sets comes last, so that --set skip.scope=hot holds for every criterion
            chosen = [*variant.overrides, *overrides, *variant.final, f"train.seed={seed}"]
            config = load_pipeline(path, chosen)
            if skip_share is not None and CRITERIA.get(config.criterion).drops:
                target = _target_drop(config, runs_dir, skip_share, progress)
                config = load_pipeline(path, [*chosen, f"skip.target_drop={target:.4f}"])
            result = run_pipeline(config, runs_dir, progress=progress)
            hot_rows.add(_figures_of(result, SegregateFigures).hot_rows)
            if len(hot_rows) > 1 and not any("segregate." in override for override in variant.overrides):
                raise ConfigError(
                    f"`segregate.hot_budget` = {config.segregate.hot_budget} buys variants different hot sets: "
                    f"{sorted(hot_rows)} rows, because what is kept of a row beside its weights differs",
                    hint='give the budget as a share, such as "10%", so that differences are paired',
                )
            cells.append(_figures_of(result, TrainFigures))
    return [_summarise(variant, cells, trained[0]) for variant, cells in zip(grid, trained, strict=True)]


def _larger_batches(
    path: Path,
    runs_dir: Path,
    grid: Sequence[Variant],
    overrides: Sequence[str],
    skip_share: float | None,
    progress: Progress,
) -> list[Variant]:
    """Give the rivals that skip nothing and take as few steps as the variants that skip; each batch size once."""
    found: dict[tuple[str, ...], Variant] = {}
    for variant in grid:
        config = load_pipeline(path, [*variant.overrides, *overrides])
        if not CRITERIA.get(config.criterion).drops:
            continue
        share = skip_share
        if share is None:
            share = config.skip.target_drop * _classified_share(config, runs_dir, progress)
        batch_size = round(config.train.batch_size / (1 - share))
        varied = tuple(
            one for one in variant.overrides if not one.startswith(("skip.", "train.mode", "train.batch_size"))
        )
        larger = ("train.mode=resident", f"train.batch_size={batch_size}")
        name = " ".join((f"none, batch {batch_size}", *varied))
        found[*varied, *larger] = Variant(name=name, overrides=varied, final=larger)
    return list(found.values())


def _target_drop(config: PipelineConfig, runs_dir: Path, share: float, progress: Progress) -> float:
    """D that makes a criterion skip a share of all samples."""
    classified = _classified_share(config, runs_dir, progress)
    if share >= classified:
        raise ConfigError(
            f"expected a share of samples to skip below {classified:.3f}, which `{config.criterion}` classifies; "
            f"found {share}",
            hint="raise `segregate.hot_budget`, or skip less",
        )
    return share / classified


def _classified_share(config: PipelineConfig, runs_dir: Path, progress: Progress) -> float:
    """Share of all samples that a criterion decides about: those of its scope, and none in the first segment."""
    from slipstream.training.order.schedule import default_segment_steps

    before = run_pipeline(config, runs_dir, stages=["preprocess", "segregate"], progress=progress)
    segregated = _figures_of(before, SegregateFigures)
    total = segregated.num_train
    steps = config.skip.refresh_steps or default_segment_steps(total, config.train.batch_size)
    first = min(1.0, steps * config.train.batch_size / (total * config.train.epochs))
    return (1 - first) * (1.0 if config.skip_rule.scope == "all" else segregated.samples["hot"] / total)


def _summarise(variant: Variant, cells: Sequence[TrainFigures], first: Sequence[TrainFigures]) -> ComparedVariant:
    figures = {name: _spread([_figures(cell)[name] for cell in cells]) for name in _figures(cells[0])}
    changes = [_figures(cell)["auc"] - _figures(base)["auc"] for cell, base in zip(cells, first, strict=True)]
    figures["auc_change"] = _spread(changes)
    return ComparedVariant(
        name=variant.name, overrides=(*variant.overrides, *variant.final), figures=figures, seeds=len(cells)
    )


def _figures_of(result: RunResult, kind: type[FiguresT]) -> FiguresT:
    figures = result.figures(kind)
    assert figures is not None, kind.stage
    return figures


def _figures(cell: TrainFigures) -> dict[str, float]:
    tiers = cell.bytes_per_tier
    figures = {
        "seconds": cell.train_seconds,
        "cpu_seconds": cell.cpu_seconds,
        "samples_per_second": cell.samples_per_second,
        "samples_seen": cell.samples_seen,
        "skipped_share": cell.samples_dropped / (cell.samples_seen + cell.samples_dropped),
        "auc": (cell.test.auc + cell.val.auc) / 2,
        "hit_ratio": cell.hit_ratio,
        "device_bytes": sum(size for tier, size in tiers.items() if tier != "cold"),
        "host_bytes": tiers["cold"],
        "moved_bytes": cell.bytes_to_device + cell.bytes_to_host,
    }
    for split, quality in (("test", cell.test), ("val", cell.val)):
        figures |= {f"{split}_{name}": value for name, value in asdict(quality).items()}
    return figures


def _spread(values: Sequence[float]) -> Spread:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Spread(mean=mean(values), error=error)
