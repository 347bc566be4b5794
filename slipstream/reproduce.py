"""Make an artifact again from what its manifest says, and compare.

manifest of the artifact, and of those it was made from -> pipeline settings      read_settings
the same stage, in a run folder of its own                                       remake
outputs by sha256, figures by value; what tells times is left out                reproduce_artifact
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from slipstream.config import PipelineConfig, build_pipeline
from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.artifacts import Artifact, StageKey, describe_altered, open_artifact, publish, scratch_dir
from slipstream.io.capacity import peak_memory
from slipstream.io.certificates import FILE as CERTIFICATE
from slipstream.io.environment import PACKAGES, describe_environment
from slipstream.io.locks import hold_artifact
from slipstream.progress import Progress, Silent
from slipstream.stage import StageJob
from slipstream.stage_list import STAGES

if TYPE_CHECKING:
    from slipstream.io.figures import Figures

_TIMES = "events/"
"""TensorBoard's files, in which every event has its time."""
_OF_TIME = ("seconds", "per_second")
"""What is in the names of figures that tell times."""
_NAMES_SHOWN = 3
_STAGES = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileAgain:
    """One output, made twice."""

    name: str
    verdict: str
    """`equal`, `differs`, `missing` (not made again) or `new` (not there before)."""
    sha256: str
    """Of the artifact's; empty where it has none."""
    sha256_again: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureAgain:
    """A figure of the manifest that came out otherwise."""

    name: str
    before: Any
    again: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """What became of making an artifact again."""

    artifact: str
    stage: str
    files: list[FileAgain]
    figures: list[FigureAgain]
    """Those that differ."""
    left_out: list[str]
    """Outputs that are not compared."""
    environment: dict[str, tuple[str, str]]
    """What is recorded of the making and is otherwise here: (then, now)."""
    reason: str
    """Why it differs, most likely; empty where nothing does."""
    seconds: float
    """That it took this time."""

    @property
    def is_equal(self) -> bool:
        """Whether every output and figure came out the same."""
        return not self.figures and all(file.verdict == "equal" for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Give it as plain values."""
        return {"equal": self.is_equal, **asdict(self)}


def reproduce_artifact(
    folder: Path, *, raw: Sequence[str] = (), work: Path | None = None, progress: Progress | None = None
) -> Reproduction:
    """Make an artifact again, from the inputs it was made from, and compare.

    Args:
        folder: The artifact.
        raw: Raw files, where it was made from such; artifacts do not say where those are.
        work: Folder for the run folder of the second making, which stays; None for one that goes.
        progress: Told how far it is.

    Raises:
        ArtifactError: The artifact or an input is missing or altered, or another version made it of other settings.
    """
    artifact = open_artifact(folder)
    with contextlib.ExitStack() as held:
        held.enter_context(hold_artifact(artifact.path, shared=True))
        inputs = find_inputs(artifact)
        for one in (artifact, *inputs.values()):
            held.enter_context(hold_artifact(one.path, shared=True))
            if altered := one.find_altered(by_hash=True):
                raise ArtifactError(describe_altered(one.path, altered), hint=one.remedy)
        progress = progress or Silent()
        config = read_settings(artifact, inputs, raw, progress)
        if work is None:
            work = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-reproduce-")))
        started = time.perf_counter()
        again = remake(artifact, inputs, config, work, progress)
        return _compare(artifact, again, seconds=round(time.perf_counter() - started, 3))


def find_inputs(artifact: Artifact) -> dict[str, Artifact]:
    """Find what an artifact was made from, and what that was made from, by stage.

    Raises:
        ArtifactError: One is missing; names it.
    """
    run_dir = artifact.path.resolve().parent.parent
    found: dict[str, Artifact] = {}
    waiting = [artifact]
    while waiting:
        one = waiting.pop()
        for name, fingerprint in one.manifest["inputs"].items():
            if name not in _STAGES or name in found:
                continue  # raw files are found otherwise
            path = run_dir / name / fingerprint
            if not path.exists():
                raise ArtifactError(
                    f"expected `{path}`, which `{one.path}` was made from; it is missing",
                    hint=f"run `slipstream {_STAGES[name].comes_with or name}` with the pipeline that made it",
                )
            found[name] = open_artifact(path)
            waiting.append(found[name])
    return found


# --- settings ------------------------------------------------------------------------------------------------


def read_settings(
    artifact: Artifact, inputs: Mapping[str, Artifact], raw: Sequence[str], progress: Progress
) -> PipelineConfig:
    """Put together the pipeline that an artifact was made by, from manifests alone.

    Args:
        artifact: The artifact.
        inputs: What it was made from, by stage.
        raw: Raw files, where they are read again.
        progress: Told how far their hashing is.

    Raises:
        ArtifactError: This version cannot make the same settings of them, or raw files are missing or others.
    """
    tree: dict[str, Any] = {"name": artifact.path.resolve().parent.parent.name, "dataset": {}}
    for name in ("generate", "preprocess", "profile", "segregate", "train"):
        source = artifact if artifact.manifest["stage"] == name else inputs.get(name)
        if source is not None:
            _take_over(tree, name, source.manifest["config"])
            tree["seed"] = tree.get("seed") or source.manifest["seed"]
    if artifact.manifest["stage"] != "train":
        tree["seed"] = artifact.manifest["seed"]
    tree["dataset"].setdefault("source", "synthetic")
    if tree["dataset"]["source"] != "synthetic":
        tree["dataset"]["raw"] = list(raw) or ["not read again"]
    try:
        config = build_pipeline(_without_none(tree))
    except ConfigError as exc:
        raise _of_another_version(artifact, str(exc)) from exc
    _check_settings(artifact, config)
    if "raw" in artifact.manifest["inputs"]:
        _check_raw(artifact, config, progress, given=bool(raw))
    return config


def _take_over(tree: dict[str, Any], stage: str, settings: Mapping[str, Any]) -> None:
    """Undo what made a stage's settings of a pipeline file."""
    sections = get_type_hints(PipelineConfig)

    def take(section: str, given: Mapping[str, Any]) -> None:
        known = {spec.name for spec in fields(sections[section])}
        tree[section] = tree.get(section, {}) | {name: value for name, value in given.items() if name in known}

    if stage == "train":
        tree |= {"model": settings["model"], "tables": settings.get("tables", {})}
        take("train", settings["train"])
        take("skip", settings["skip"])
        return
    if stage in ("generate", "preprocess"):
        take("dataset", settings)
        if layout := settings.get("layout"):
            names = {} if layout["has_header"] else {"names": layout["names"]}
            tree["dataset"] |= {"columns": layout["columns"], "separator": layout["separator"], **names}
    if stage == "profile":
        take("segregate", settings)  # its curve is measured under two keys of the stage after it
    if stage in sections:
        take(stage, settings)


def _check_settings(artifact: Artifact, config: PipelineConfig) -> None:
    """Make sure that the stage would get the settings it had; keys that came since have their defaults.

    `row_bytes` follows from sections that a stage before training does not keep: it is handed over as it was.
    """
    now = dict(_flat(json.loads(json.dumps(_STAGES[artifact.manifest["stage"]].settings_of(config)))))
    before = dict(_flat(artifact.manifest["config"]))
    if lost := [key for key, value in before.items() if key != "row_bytes" and now.get(key) != value]:
        raise _of_another_version(artifact, f"this version has no {', '.join(f'`{key}`' for key in lost)} like that")


def _check_raw(artifact: Artifact, config: PipelineConfig, progress: Progress, *, given: bool) -> None:
    expected, names = artifact.manifest["inputs"]["raw"], artifact.counts.get("files", [])
    if not given:
        raise ArtifactError(
            f"`{artifact.path}` was made from raw files, and does not say where they are: {', '.join(names)}",
            hint="name them, in order: --raw FILES; their content is compared with what was read then",
        )
    found = _STAGES["preprocess"].other_inputs(config, progress)["raw"]
    if found != expected:
        raise ArtifactError(
            f"expected the raw files that `{artifact.path}` was made from ({', '.join(names)}), fingerprint "
            f"{expected}, found others, fingerprint {found}",
            hint="name the same files in the same order",
        )


def _of_another_version(artifact: Artifact, why: str) -> ArtifactError:
    version = artifact.manifest["slipstream"]
    return ArtifactError(
        f"`{artifact.path}` cannot be made again by slipstream {describe_environment()['slipstream']}: {why}",
        hint=f"it was made by slipstream {version}: install that version, or run the pipeline anew",
    )


def _without_none(value: Any) -> Any:
    """Leave out keys that are not set, as a pipeline file does."""
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


# --- the second making ---------------------------------------------------------------------------------------


def remake(
    artifact: Artifact, inputs: Mapping[str, Artifact], config: PipelineConfig, work: Path, progress: Progress
) -> Artifact:
    """Run the stage of an artifact in a run folder of its own, from the inputs of the first making."""
    manifest = artifact.manifest
    key = StageKey(stage=manifest["stage"], config=manifest["config"], inputs=manifest["inputs"], seed=manifest["seed"])
    run_dir = work / config.name
    scratch = scratch_dir(run_dir, key)
    started = time.perf_counter()
    if "row_bytes" in key.config:
        figures = _segregate(config, inputs, row_bytes=key.config["row_bytes"], scratch=scratch, progress=progress)
    else:
        job = StageJob(config=config, key=key, inputs=inputs, scratch=scratch, progress=progress)
        figures = _STAGES[key.stage].run(job)
    seconds = time.perf_counter() - started
    return publish(run_dir, key, figures.to_json(), seconds=seconds, peak_bytes=peak_memory())


def _segregate(
    config: PipelineConfig, inputs: Mapping[str, Artifact], *, row_bytes: int, scratch: Path, progress: Progress
) -> Figures:
    """Segregate under a budget in bytes, whose rows weigh what they weighed."""
    from slipstream.io.counts import read_counts
    from slipstream.stages import segregate

    return segregate.run(
        config.segregate,
        processed=inputs["preprocess"],
        counts=read_counts(inputs["profile"]),
        row_bytes=row_bytes,
        scratch=scratch,
        progress=progress,
    )


# --- what became of it ---------------------------------------------------------------------------------------


def _compare(before: Artifact, again: Artifact, *, seconds: float) -> Reproduction:
    named = before.manifest["outputs"].keys() | again.manifest["outputs"].keys()
    left_out = sorted(name for name in named if name.startswith(_TIMES) or name == CERTIFICATE)
    files = [_compare_file(name, before, again) for name in sorted(named - set(left_out))]
    figures = list(_compare_figures(before.counts, again.counts))
    then, now = before.manifest.get("environment", {}), describe_environment()
    changed = {name: (then[name], now.get(name, "")) for name in then if then[name] != now.get(name, "")}
    is_equal = not figures and all(file.verdict == "equal" for file in files)
    return Reproduction(
        artifact=str(before.path),
        stage=before.manifest["stage"],
        files=files,
        figures=figures,
        left_out=left_out,
        environment=changed,
        reason="" if is_equal else _guess_reason(before, changed),
        seconds=seconds,
    )


def _compare_file(name: str, before: Artifact, again: Artifact) -> FileAgain:
    hashes = [_sha256(one.path / name) if name in one.manifest["outputs"] else "" for one in (before, again)]
    verdict = "equal" if hashes[0] == hashes[1] else "differs"
    if not all(hashes):
        verdict = "missing" if hashes[0] else "new"
    return FileAgain(name=name, verdict=verdict, sha256=hashes[0], sha256_again=hashes[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _compare_figures(before: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[FigureAgain]:
    """Give figures that differ; those that tell times are passed over, and those that came since."""
    then, now = dict(_flat(before)), dict(_flat(json.loads(json.dumps(again))))
    for name, value in then.items():
        is_time = any(part in name for part in _OF_TIME)
        # text, so that NaN equals NaN
        if not is_time and json.dumps(value) != json.dumps(now.get(name)):
            yield FigureAgain(name=name, before=value, again=now.get(name))


def _guess_reason(before: Artifact, changed: Mapping[str, tuple[str, str]]) -> str:
    """Say why a second making came out otherwise, most likely."""
    if "environment" not in before.manifest:
        return "the artifact is of an older form, which does not say what it was made with"

    def told(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {changed[name][0]} -> {changed[name][1]}" for name in names if name in changed)

    reasons = []
    if versions := told(["slipstream", "python", *PACKAGES]):
        reasons.append(f"other versions ({versions})")
    if threads := told(["cores", "threads"]):
        reasons.append(f"another number of threads, by which matrix products are rounded otherwise ({threads})")
    if hardware := told(["processor", "machine", "system"]):
        reasons.append(f"other hardware or system, with other instructions ({hardware})")
    settings = before.manifest["config"].get("train", {})
    if before.counts.get("device") == "cuda" and not settings.get("deterministic"):
        reasons.append("a GPU, which repeats to the bit only with `train.deterministic`")
    return "; ".join(reasons) or (
        "nothing that is recorded is otherwise here: the code was changed without its version, or the stage does not "
        "repeat, which is a fault"
    )


def require_equal(reproduction: Reproduction) -> None:
    """Fail where something came out otherwise.

    Raises:
        ArtifactError: Says what, and why most likely.
    """
    if reproduction.is_equal:
        return
    names = [file.name for file in reproduction.files if file.verdict != "equal"]
    names = names or [figure.name for figure in reproduction.figures]
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    raise ArtifactError(
        f"`{reproduction.artifact}` came out otherwise when it was made again: {shown}{more}",
        hint=f"most likely {reproduction.reason}",
    )
