"""How training went and what the model is worth: sections of the page of a run."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from slipstream.io.figures import GenerateFigures, TrainFigures
from slipstream.ops.metrics import Quality
from slipstream.report import charts
from slipstream.report.facts import SPLIT_NAMES, RunFacts
from slipstream.report.page import Figure, Grid, Paragraph, Part
from slipstream.report.words import counted, least, most, number, thinned

_MOST_REASONS = 12


def training(facts: RunFacts) -> Iterator[Part]:
    """Show loss, learning rate and speed over steps."""
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    losses, rates, speeds = facts.losses(), facts.learning_rates(), facts.speeds()
    yield Paragraph(
        text=f"{trained.steps:,} steps of {facts.config.train.batch_size:,} samples at most, {trained.hot_steps:,} of "
        f"them on hot samples alone; {trained.samples_seen:,} samples trained on, "
        f"{counted(facts.config.train.epochs, 'epoch')}."
    )
    if losses.height:
        yield Figure(
            title="Training loss",
            spec=charts.over_steps(losses, "loss", "mean loss of the stretch"),
            alt=f"A line from {losses['loss'][0]:.4f} at step {losses['step'][0]:,} to {losses['loss'][-1]:.4f} at "
            f"step {losses['step'][-1]:,}; lowest {least(losses['loss']):.4f}.",
        )
    train = facts.config.train
    yield Figure(
        title="Learning rate, as the schedule has it",
        spec=charts.over_steps(rates, "lr", "learning rate", zero=True),
        alt=f"The learning rate: at most {most(rates['lr']):.4g}, warm-up over {train.lr_warmup:.0%} of training, "
        f"decay {train.lr_decay}.",
    )
    if speeds.height > 1:
        yield Figure(
            title="Speed since the start",
            spec=charts.over_steps(speeds, "samples_per_second", "samples/s", axis_format="~s", zero=True),
            alt=f"Samples trained on per second since the start: {speeds['samples_per_second'][0]:,.0f} at first, "
            f"{speeds['samples_per_second'][-1]:,.0f} at the end.",
        )
    yield Grid(
        title="Training loss",
        columns=("step", "mean loss"),
        rows=[(f"{step:,}", f"{loss:.5f}") for step, loss in thinned(losses).iter_rows()],
    )


def validation(facts: RunFacts) -> Iterator[Part]:
    """Show what was measured on validation data on the way, and which model was kept."""
    trained = facts.figures(TrainFigures)
    if trained is None or not trained.validations:
        return
    checks = trained.validations
    frame = pl.DataFrame(
        [{"step": one.step, "logloss": one.quality.logloss, "auc": one.quality.auc} for one in checks]
    ).fill_nan(None)
    [best] = [one for one in checks if one.step == trained.best_step]
    yield Paragraph(
        text=f"Validation data were measured {counted(len(checks), 'time')} on the way; the model after step "
        f"{best.step:,}, with the least logloss, was kept."
        + (
            " Training stopped early: as many measurements as `train.patience` says were no better."
            if trained.stopped_early
            else ""
        )
    )
    for name, title in (("logloss", "Validation logloss"), ("auc", "Validation AUC")):
        ends = f"from {number(getattr(checks[0].quality, name))} to {number(getattr(checks[-1].quality, name))}"
        yield Figure(
            title=title,
            spec=charts.over_steps(frame, name, name if name == "logloss" else "AUC", kept=best.step),
            alt=f"A line {ends} over {checks[-1].step:,} steps; at step {best.step:,}, whose model was kept, "
            f"{number(getattr(best.quality, name))}.",
        )
    yield Grid(
        title="Validation",
        columns=("step", "epoch", "AUC", "logloss", "NE", "calibration", "accuracy"),
        rows=[
            (f"{one.step:,}{' (kept)' if one is best else ''}", f"{one.epoch + 1}", *_quality_cells(one.quality))
            for one in checks
        ],
        is_wide=True,
    )


def quality(facts: RunFacts) -> Iterator[Part]:
    """Show metrics, ROC, calibration and the distribution of predictions."""
    trained = facts.figures(TrainFigures)
    if trained is None:
        return
    generated = facts.figures(GenerateFigures)
    columns = ["split", "AUC", "logloss", "NE", "calibration", "accuracy"] + (["teacher's AUC"] if generated else [])
    rows = []
    for split, quality in (("test", trained.test), ("val", trained.val)):
        best = [number(generated.splits[split].auc)] if generated else []
        rows.append([SPLIT_NAMES[split], *_quality_cells(quality), *best])
    yield Grid(title="Quality", columns=columns, rows=rows, is_wide=True)
    roc, reliability, histogram = facts.roc(), facts.reliability(), facts.histogram()
    if roc.height:
        yield Figure(
            title="ROC",
            spec=charts.roc(roc),
            alt=f"ROC curves; area {number(trained.test.auc)} for test, {number(trained.val.auc)} for validation.",
        )
    elif not reliability.is_empty():
        yield Paragraph(text="No ROC curve: each split has labels of one class only.", kind="note")
    if reliability.is_empty():
        return
    yield Figure(
        title="Calibration",
        spec=charts.reliability(reliability),
        alt="Click rate over mean prediction, in bins of equally many samples, with two standard errors, and the "
        f"diagonal. Mean prediction over click rate: {number(trained.test.calibration, 3)} for test, "
        f"{number(trained.val.calibration, 3)} for validation.",
    )
    yield Grid(
        title="Calibration, by bin",
        columns=("split", "mean prediction", "click rate", "samples"),
        rows=[
            (line["split"], f"{line['predicted']:.4f}", f"{line['click_rate']:.4f}", f"{line['samples']:,}")
            for line in reliability.iter_rows(named=True)
        ],
    )
    yield Figure(
        title="Distribution of predictions",
        spec=charts.histogram(histogram),
        alt="Histograms of predicted probabilities, one panel per split: samples with a click, and those without.",
    )


def _quality_cells(quality: Quality) -> list[str]:
    digits = {"calibration": 3}
    return [number(getattr(quality, n), digits.get(n, 4)) for n in ("auc", "logloss", "ne", "calibration", "accuracy")]


def skipping(facts: RunFacts) -> Iterator[Part]:
    """Show samples left out by round, and checks of staleness."""
    trained, config = facts.figures(TrainFigures), facts.config
    if trained is None or config.criterion == "none":
        return
    dropped, checks = facts.dropped(), facts.checks()
    classified = "samples" if config.skip_rule.scope == "all" else "hot samples"
    yield Paragraph(
        text=f"Criterion {config.criterion}: {trained.samples_dropped:,} samples left out. Asked "
        f"{trained.drop_asked:.1%} of {trained.samples_classified:,} {classified} it decided about, "
        f"achieved {trained.drop_achieved:.1%}."
    )
    if dropped.height:
        yield Figure(
            title="Samples skipped, by round",
            spec=charts.bars_over_steps(dropped, "dropped", "samples skipped"),
            alt="Bars: samples that the rounds begun since the report before left out; "
            f"{most(dropped['dropped']):,.0f} at "
            f"most, {dropped['total'][-1]:,} in all.",
        )
    if checks.height:
        tall = checks.unpivot(["stale_rows", "untouched_rows"], index="step", variable_name="kind", value_name="rows")
        yield Figure(
            title="Threshold T",
            spec=charts.over_steps(checks, "threshold", "T", zero=True),
            alt=f"T at {checks.height} checks, from {_show_threshold(checks['threshold'][0])} to "
            f"{_show_threshold(checks['threshold'][-1])}.",
        )
        yield Figure(
            title="Stale rows",
            spec=charts.stale_rows(tall.with_columns(pl.col("kind").str.replace("_", " "))),
            alt=f"Stale hot rows from {checks['stale_rows'][0]:,} to {checks['stale_rows'][-1]:,}; rows not looked up "
            f"in the window at most {most(checks['untouched_rows']):,.0f}.",
        )
        yield Grid(
            title="Checks",
            columns=("step", "T", "stale rows", "untouched rows"),
            rows=[
                (f"{step:,}", _show_threshold(threshold), f"{stale:,}", f"{untouched:,}")
                for step, threshold, stale, untouched in thinned(checks).iter_rows()
            ],
        )
    if dropped.height:
        yield Grid(
            title="Samples skipped",
            columns=("step", "since the step before", "in all"),
            rows=[(f"{step:,}", f"{count:,}", f"{total:,}") for step, count, total in thinned(dropped).iter_rows()],
        )


def _show_threshold(threshold: float | None) -> str:
    return "–" if threshold is None else f"{threshold:.4g}"
