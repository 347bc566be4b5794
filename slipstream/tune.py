"""Tune: a search over keys of a pipeline, judged by validation; every trial is an ordinary run.

    runs/<name>/tune/<hash>/study.log    what optuna knows of the search: a journal of lines, one JSON document each

Trials share what they do not change: a trial of another learning rate trains only. A search that was interrupted goes
on where it stopped. Validation data alone decides; nothing here looks at test.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import xxhash

from slipstream.config import PipelineConfig, build_pipeline
from slipstream.errors import ConfigError, TrainingError
from slipstream.io.artifacts import discard, scratch_dir
from slipstream.io.figures import TrainFigures
from slipstream.io.locks import hold
from slipstream.options import read_tree, to_toml
from slipstream.pipeline import Run, run_pipeline
from slipstream.progress import Progress

if TYPE_CHECKING:
    import optuna

_TRIALS_BEFORE_PRUNING = 5
"""Finished trials that a trial is compared with at least before it may be stopped early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """What one key may be: a list of values, or numbers between two bounds."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False
    """Whole numbers only."""
    is_log: bool = False
    """Numbers are drawn by their logarithm."""

    def suggest(self, trial: optuna.Trial) -> Any:
        """Let a trial choose a value; lists and the like are chosen by what they look like in TOML."""
        if self.choices:
            drawn: Any = trial.suggest_categorical(self.key, [to_toml(self.key, choice) for choice in self.choices])
        elif self.is_whole:
            drawn = trial.suggest_int(self.key, int(self.low), int(self.high), log=self.is_log)
        else:
            drawn = trial.suggest_float(self.key, self.low, self.high, log=self.is_log)
        return self.value_of(drawn)

    def value_of(self, drawn: Any) -> Any:
        """Give the value that was drawn: what a text stands for, or a number of four digits, which say all there is."""
        if self.choices:
            return {to_toml(self.key, choice): choice for choice in self.choices}[drawn]
        return drawn if self.is_whole else min(max(float(f"{drawn:.4g}"), self.low), self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What became of a trial."""

    number: int
    state: str
    """`complete`, `pruned` or `failed`."""
    values: dict[str, Any]
    """By key."""
    logloss: float | None = None
    """On validation data, mean over seeds; None where the trial was not finished."""
    auc: float | None = None
    """The same."""
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What came of a search."""

    trials: list[Trial]
    """In order."""
    out: Path
    """Pipeline file with the best values."""

    @property
    def best(self) -> Trial:
        """The finished trial of least logloss."""
        return min(self.ranked, key=lambda trial: trial.logloss or 0.0)

    @property
    def ranked(self) -> list[Trial]:
        """Finished trials, the best first."""
        finished = [trial for trial in self.trials if trial.logloss is not None]
        return sorted(finished, key=lambda trial: (trial.logloss, trial.number))


@dataclass(slots=True)
class _Pruner:
    """A progress that passes everything on, and stops a training whose validation is worse than most at its step."""

    inner: Progress
    trial: optuna.Trial
    seen: set[int] = field(default_factory=set)

    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Any:
        """Open a task."""
        return self.inner.task(label, total, unit, done=done)

    def measured(self, step: int, logloss: float) -> None:
        """Hear of a measurement on validation data.

        Raises:
            TrialPruned: Most finished trials were better at this step.
        """
        import optuna

        if step not in self.seen:
            self.seen.add(step)
            self.trial.report(logloss, step)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def parse_range(key: str, text: str) -> Range:
    """Read `low:high`, `low:high:log`, or `value | value | …`.

    Raises:
        ConfigError: It is none of these.
    """
    if "|" in text:
        return Range(key=key, choices=tuple(_parse_value(part.strip()) for part in text.split("|")))
    parts = [part.strip() for part in text.split(":")]
    try:
        low, high = (float(part) for part in parts[:2])
    except ValueError:
        low = high = 0.0
    is_log = parts[2:] == ["log"]
    if not low < high or (len(parts) > 2 and not is_log) or (is_log and low <= 0):
        raise ConfigError(
            f"expected a range for `{key}` such as 1:5, .005:.1:log or 'sgd | adam', found `{text}`",
            hint="the lower bound comes first, and is above 0 with :log",
        )
    is_whole = all(part.lstrip("+-").isdigit() for part in parts[:2])
    return Range(key=key, low=low, high=high, is_whole=is_whole, is_log=is_log)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def find_ranges(tree: Mapping[str, Any], given: Sequence[str]) -> list[Range]:
    """Give the ranges of a pipeline file's `[tune]`, and those on the command line, which win.

    Args:
        tree: The parsed file.
        given: `key=range` each.

    Raises:
        ConfigError: There is none, or one is no range.
    """
    texts = {f"{section}.{key}": text for section, keys in tree.get("tune", {}).items() for key, text in keys.items()}
    for one in given:
        key, equals, text = one.partition("=")
        if not equals:
            raise ConfigError(f"expected `--range key=range`, found `{one}`", hint="for example train.lr=.005:.1:log")
        texts[key.strip()] = text
    if not texts:
        raise ConfigError(
            "there is nothing to search: no key has a range",
            hint="give some, as --range train.lr=.005:.1:log or in a section [tune] of the pipeline file",
        )
    return [parse_range(key, text) for key, text in texts.items()]


def run_tuning(
    path: Path,
    runs_dir: Path,
    *,
    ranges: Sequence[str],
    overrides: Sequence[str],
    trials: int,
    seeds: int,
    out: Path,
    progress: Progress,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Tuned:
    """Search, and write the best pipeline.

    Args:
        path: Pipeline file.
        runs_dir: Folder that holds run folders.
        ranges: `key=range` each, beside those of the file's `[tune]`.
        overrides: Apply to all trials.
        trials: Trials in all; those of an interrupted search count.
        seeds: Training seeds of each trial, 0, 1, …; their mean is judged.
        out: Pipeline file to write.
        progress: Told how far each stage is.
        on_trial: Told what became of each trial.

    Raises:
        ConfigError: The extra is not installed, a range is none, or no trial could be finished.
        SlipstreamError: Whatever a stage expects to go wrong, but for trainings that fail for their values.
    """
    if find_spec("optuna") is None:
        raise ConfigError("tune needs the package `optuna`", hint="pip install 'slipstream[tune]'")
    tree = read_tree(path, overrides)
    found = find_ranges(tree, ranges)
    base = build_pipeline(tree)
    for one in found:
        _check_range(tree, one)
    folder = runs_dir / base.name / "tune" / _name_of(base, runs_dir, tree, found, seeds, progress)
    with hold(folder):
        study = _open_study(folder / "study.log", seed=base.seed)
        while sum(map(_counts, study.trials)) < trials:
            _run_trial(study, tree, found, runs_dir, seeds=seeds, progress=progress)
            on_trial(_describe(study.trials[-1], found))
        tuned = Tuned(trials=[_describe(trial, found) for trial in study.trials if _counts(trial)], out=out)
    if not tuned.ranked:
        raise ConfigError(
            f"none of {len(tuned.trials)} trials was finished: {tuned.trials[-1].reason}", hint="look at the ranges"
        )
    _write_best(tree, tuned, path)
    return tuned


def _check_range(tree: Mapping[str, Any], one: Range) -> None:
    """Build the pipeline with every choice, or both bounds, so that what cannot be is said before the first trial."""
    ends = one.choices or ((int(one.low), int(one.high)) if one.is_whole else (one.low, one.high))
    for value in ends:
        try:
            build_pipeline(_with_values(tree, {one.key: value}))
        except ConfigError as exc:
            raise ConfigError(f"`{to_toml(one.key, value)}` for `{one.key}`: {exc}", hint=exc.hint) from exc


def _name_of(
    base: PipelineConfig,
    runs_dir: Path,
    tree: Mapping[str, Any],
    ranges: Sequence[Range],
    seeds: int,
    progress: Progress,
) -> str:
    """Hash what the trials of a search depend on: the pipeline, its raw files, the ranges and the seeds."""
    data = {name: dict(key.inputs) for name, key in Run(base, runs_dir, progress).keys.items()}
    described = json.dumps([tree, data, [repr(one) for one in ranges], seeds], sort_keys=True, default=str)
    return xxhash.xxh3_64_hexdigest(described.encode())


def _open_study(journal: Path, *, seed: int) -> optuna.Study:
    """Open a search, or begin it; what a killed process was at is to be tried again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="tune",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING),
    )
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    # the sampler begins anew with every process, and must not draw what it drew before
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _run_trial(
    study: optuna.Study,
    tree: Mapping[str, Any],
    ranges: Sequence[Range],
    runs_dir: Path,
    *,
    seeds: int,
    progress: Progress,
) -> None:
    import optuna
    from optuna.trial import TrialState

    trial = study.ask()
    values = {one.key: one.suggest(trial) for one in ranges}
    figures = []
    for seed in range(seeds):
        config = build_pipeline(_with_values(tree, values | ({"train.seed": seed} if seeds > 1 else {})))
        try:
            # other seeds would be reported at the same steps
            result = run_pipeline(config, runs_dir, progress=_Pruner(progress, trial) if seed == 0 else progress)
        except optuna.TrialPruned:
            discard(scratch_dir(runs_dir / config.name, Run(config, runs_dir, progress).keys["train"]))
            study.tell(trial, state=TrialState.PRUNED)
            return
        except TrainingError as exc:
            trial.set_user_attr("reason", str(exc))
            study.tell(trial, state=TrialState.FAIL)
            return
        trained = result.figures(TrainFigures)
        assert trained is not None
        figures.append(trained.val)
    trial.set_user_attr("auc", mean(one.auc for one in figures))
    study.tell(trial, mean(one.logloss for one in figures))


def _describe(trial: optuna.trial.FrozenTrial, ranges: Sequence[Range]) -> Trial:
    states = {"COMPLETE": "complete", "PRUNED": "pruned"}
    values = {one.key: one.value_of(trial.params[one.key]) for one in ranges if one.key in trial.params}
    is_complete = trial.state.name == "COMPLETE"
    return Trial(
        number=trial.number,
        state=states.get(trial.state.name, "failed"),
        values=values,
        logloss=trial.value if is_complete else None,
        auc=trial.user_attrs.get("auc"),
        reason=trial.user_attrs.get("reason", ""),
    )


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial came to an end of its own; one that was interrupted is tried again."""
    return trial.state.name in ("COMPLETE", "PRUNED") or "reason" in trial.user_attrs


def _with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the tree with some keys set; the one given stays as it is."""
    changed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        place = changed
        for part in section.split(".") if section else []:
            inner = place.get(part, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(f"`{part}` in `{key}` is a value, not a section")
            place[part] = dict(inner)
            place = place[part]
        place[name] = value
    return changed


def _write_best(tree: Mapping[str, Any], tuned: Tuned, path: Path) -> None:
    """Write the pipeline with the best values, whole, so that it can be run as it is."""
    best = tuned.best
    found = _with_values({name: value for name, value in tree.items() if name != "tune"}, best.values)
    lines = [
        f"# {path.name} with what `slipstream tune` found best: trial {best.number} of {len(tuned.trials)}, validation "
        f"logloss {best.logloss:.4f}",
        *(f"# {key} = {to_toml(key, value)}" for key, value in best.values.items()),
        *(f"{name} = {to_toml(name, value)}" for name, value in found.items() if not isinstance(value, Mapping)),
    ]
    for section, keys in found.items():
        if isinstance(keys, Mapping):
            lines += ["", f"[{section}]", *(f"{name} = {to_toml(name, value)}" for name, value in keys.items())]
    tuned.out.parent.mkdir(parents=True, exist_ok=True)
    tuned.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
