"""What came of a search for better settings, on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slipstream.options import to_toml
from slipstream.tune import Trial, Tuned

_MOST_SHOWN = 10


def trial_line(trial: Trial) -> Text:
    """Say what became of one trial."""
    values = "  ".join(f"{key} = {to_toml(key, value)}" for key, value in trial.values.items())
    outcome = f"logloss {trial.logloss:.4f}" if trial.logloss is not None else f"{trial.state} {trial.reason}".strip()
    return Text(f"trial {trial.number:<4} {outcome:<16} {values}")


def tuned_table(tuned: Tuned) -> RenderableType:
    """Show the best trials, and the command to run next."""
    ranked, keys = tuned.ranked, list(tuned.best.values)
    pruned = sum(trial.state == "pruned" for trial in tuned.trials)
    failed = sum(trial.state == "failed" for trial in tuned.trials)
    title = f"{len(ranked)} trials finished, {pruned} stopped early, {failed} failed; validation data"
    table = Table(box=None)
    for name in ("trial", "logloss", "AUC", *keys):
        table.add_column(name, justify="right")
    for trial in ranked[:_MOST_SHOWN]:
        values = [to_toml(key, trial.values[key]) for key in keys]
        auc = "–" if trial.auc is None else f"{trial.auc:.4f}"
        table.add_row(str(trial.number), f"{trial.logloss:.4f}", auc, *values)
    command = Text(f"    slipstream run {tuned.out}", style="bold")
    return Group(Text(title), table, Text(f"written {tuned.out}; next"), command)
