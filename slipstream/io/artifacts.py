"""Artifacts: what a stage leaves behind, and how the next one knows that it is whole.

    runs/<name>/<stage>/<fingerprint>/           published: complete, its manifest.json written last
    runs/<name>/<stage>/.<fingerprint>.partial/  at work, or left by a killed process; keeps finished parts
    runs/<name>/<stage>/.<fingerprint>.lock      taken while a process makes or reads the artifact: see locks.py

The fingerprint covers the stage's resolved config, the fingerprints of its inputs, the seed and the format
version; not paths or times. Publishing is one rename, and all that it names is forced to disk before, so a half-written
folder never bears a published name, not even after a power cut.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from slipstream import __version__
from slipstream.errors import ArtifactError, CapacityError
from slipstream.io.capacity import show_bytes
from slipstream.io.environment import describe_environment

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARSED = "parsed"
"""Folder of a run for parsed chunks, which are no artifacts: they may be removed at any time."""

_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StageKey:
    """What a stage's result depends on, and nothing else."""

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    seed: int

    @property
    def fingerprint(self) -> str:
        """Name of the artifact's folder: 16 hex digits."""
        body = {
            "stage": self.stage,
            "format": FORMAT_VERSION,
            "config": self.config,
            "inputs": self.inputs,
            "seed": self.seed,
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A published stage output."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Its name, as inputs of later stages refer to it."""
        return self.path.name

    @property
    def counts(self) -> dict[str, Any]:
        """The figures its stage reported."""
        counts: dict[str, Any] = self.manifest["counts"]
        return counts

    def files(self, folder: str = "", suffix: str = "") -> list[Path]:
        """Give listed files below `folder` that end in `suffix`, in name order."""
        names = [name for name in self.manifest["outputs"] if name.startswith(folder) and name.endswith(suffix)]
        return [self.path / name for name in sorted(names)]

    def check(self, file: Path) -> Path:
        """Make sure that a listed file is there and unaltered; returns it.

        Raises:
            ArtifactError: The file is missing, or its size or hash differs from the manifest.
        """
        if not file.exists():
            raise ArtifactError(f"expected `{file}`, which the manifest lists; it is missing", hint=self.remedy)
        if self._is_altered(file.relative_to(self.path).as_posix()):
            raise ArtifactError(f"`{file}` was altered after it was published: its hash differs", hint=self.remedy)
        return file

    @property
    def remedy(self) -> str:
        """What to do when it was altered."""
        stage = self.manifest["stage"]
        if stage == "generate":
            return f"remove the folder `{self.path}`; the next run makes it again"
        return f"re-run `slipstream {stage} --force`"

    def find_altered(self, *, by_hash: bool = False) -> list[str]:
        """Names of listed files that are missing or no longer what was published, in name order.

        Args:
            by_hash: Hash every file. Otherwise sizes are compared, and a file is hashed only when it was written
                after the manifest, which is written last: that costs one `stat` a file, and misses a file that was
                altered and given its old time again. A copy of an artifact may have to be hashed each time.
        """
        written = 0 if by_hash else (self.path / MANIFEST).stat().st_mtime_ns
        return [name for name in sorted(self.manifest["outputs"]) if self._is_altered(name, since=written)]

    def _is_altered(self, name: str, *, since: int = 0) -> bool:
        file, expected = self.path / name, self.manifest["outputs"][name]
        try:
            found = file.stat()
            is_suspect = found.st_mtime_ns >= since
            return found.st_size != expected["bytes"] or (is_suspect and hash_file(file) != expected["xxh3"])
        except OSError:
            return True


def describe_altered(path: Path, names: Sequence[str]) -> str:
    """Say which files of an artifact were altered; at least one."""
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"altered or removed after `{path}` was published: {shown}{more}"


def hash_file(path: Path) -> str:
    """xxh3-64 of a file's content, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_artifact(run_dir: Path, key: StageKey) -> Artifact | None:
    """Give the published artifact of a key, or None."""
    path = run_dir / key.stage / key.fingerprint
    return open_artifact(path) if path.exists() else None


def open_artifact(path: Path) -> Artifact:
    """Open a published artifact.

    Raises:
        ArtifactError: There is none at `path`, or its manifest cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"stage", "config", "inputs", "outputs", "counts"} <= manifest.keys():
            raise ValueError("it lacks what every manifest has")
        _check_outputs(path, manifest["outputs"])
    except OSError as exc:
        raise ArtifactError(
            f"expected a published artifact at `{path}`, found no readable {MANIFEST} there",
            hint="an artifact is a folder like runs/tiny/train/<fingerprint>; a run prints where its artifacts are",
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(
            f"`{path / MANIFEST}` is damaged: {exc}", hint=f"remove the folder `{path}`; the next run makes it again"
        ) from exc
    return Artifact(path=path, manifest=manifest)


def _check_outputs(folder: Path, outputs: object) -> None:
    """Refuse names that lead out of the artifact's folder: nobody knows who else writes there.

    Raises:
        ValueError: A name is absolute, climbs with `..`, or is or passes a link to elsewhere; or an entry is no size
            and hash.
    """
    if not isinstance(outputs, dict):
        raise ValueError(f"expected a table of files under `outputs`, found {type(outputs).__name__}")
    inside = os.path.realpath(folder)
    folder_of = functools.cache(os.path.realpath)  # many files share one
    for name, entry in outputs.items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("xxh3")) is not str:
            raise ValueError(f"expected `bytes` and `xxh3` of output `{name}`, found {entry!r}")
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
            raise ValueError(f"output `{name}` is not inside the artifact's folder")
        file = folder / name
        place = os.path.realpath(file) if file.is_symlink() else f"{folder_of(file.parent)}/{file.name}"
        if os.path.commonpath([inside, place]) != inside:
            raise ValueError(f"output `{name}` is a link that leads out of the artifact's folder")


def scratch_dir(run_dir: Path, key: StageKey) -> Path:
    """Hidden folder a stage works in; finished parts in it survive a kill."""
    path = _partial_dir(run_dir, key)
    with wrap_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for half_written in path.rglob(".*.tmp"):
            half_written.unlink()
    return path


def publish(run_dir: Path, key: StageKey, counts: Mapping[str, Any], *, seconds: float, peak_bytes: int) -> Artifact:
    """Write the manifest of a finished scratch folder and give it its name.

    Files in the scratch folder's `work/` are intermediate and removed. The manifest says that the rest is whole: a
    process killed after it was written leaves nothing to do but `complete_publishing`.
    """
    scratch = scratch_dir(run_dir, key)
    outputs = {}
    for file in sorted(scratch.rglob("*")):
        if file.is_file() and file.relative_to(scratch).parts[0] not in {MANIFEST, "work"}:
            sync(file)
            outputs[file.relative_to(scratch).as_posix()] = {"bytes": file.stat().st_size, "xxh3": hash_file(file)}
    manifest = {
        "stage": key.stage,
        "slipstream": __version__,
        "format": FORMAT_VERSION,
        "seed": key.seed,
        "config": dict(key.config),
        "inputs": dict(key.inputs),
        "outputs": outputs,
        "counts": dict(counts),
        "seconds": round(seconds, 3),
        "peak_bytes": peak_bytes,
        "environment": describe_environment(),
    }
    # names last: what the manifest lists must be on disk before a manifest can be, after a power cut too
    for folder in {scratch, *(parent for name in outputs for parent in (scratch / name).parents)}:
        if folder.is_relative_to(scratch):
            sync(folder)
    write_json(scratch / MANIFEST, manifest)
    complete_publishing(run_dir, key)
    return Artifact(path=run_dir / key.stage / key.fingerprint, manifest=manifest)


def add_output(artifact: Artifact, name: str, value: object) -> Artifact:
    """Add a JSON file to a published artifact, or replace it; the manifest lists it, and stays true.

    The caller holds the artifact alone. The manifest is written last, and its time is what tells files that were
    written after it; so every file is hashed before.

    Args:
        artifact: The artifact.
        name: Of the file.
        value: Its content.

    Raises:
        ArtifactError: A file was altered since it was published.
    """
    if altered := [other for other in artifact.find_altered(by_hash=True) if other != name]:
        raise ArtifactError(describe_altered(artifact.path, altered), hint=artifact.remedy)
    outputs = {other: entry for other, entry in artifact.manifest["outputs"].items() if other != name}
    if name in artifact.manifest["outputs"]:  # a kill while it is replaced must not leave one that looks altered
        write_json(artifact.path / MANIFEST, artifact.manifest | {"outputs": outputs})
        sync(artifact.path)
    file = artifact.path / name
    write_json(file, value)
    outputs[name] = {"bytes": file.stat().st_size, "xxh3": hash_file(file)}
    manifest = artifact.manifest | {"outputs": dict(sorted(outputs.items()))}
    sync(artifact.path)
    write_json(artifact.path / MANIFEST, manifest)
    return Artifact(path=artifact.path, manifest=manifest)


def complete_publishing(run_dir: Path, key: StageKey) -> None:
    """Give a scratch folder whose manifest is written its published name; does nothing for any other."""
    scratch, final = _partial_dir(run_dir, key), run_dir / key.stage / key.fingerprint
    if (scratch / MANIFEST).exists():
        with wrap_write_errors(final):
            shutil.rmtree(scratch / "work", ignore_errors=True)
            sync(scratch)
            scratch.rename(final)
            for folder in (final.parent, run_dir, run_dir.parent):
                sync(folder)


def _partial_dir(run_dir: Path, key: StageKey) -> Path:
    return run_dir / key.stage / f".{key.fingerprint}.partial"


def remove_artifact(run_dir: Path, key: StageKey) -> None:
    """Forget a published artifact and any scratch folder, for `--force`."""
    for folder in (run_dir / key.stage / key.fingerprint, _partial_dir(run_dir, key)):
        if folder.exists():
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a folder of a stage; a kill half-way leaves what `leftovers` lists, never a folder that looks whole."""
    doomed = folder.with_name(f".{folder.name.strip('.').partition('.')[0]}.removed")
    with wrap_write_errors(folder):
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed)


def find_place(run_dir: Path, key: StageKey) -> Path:
    """Where the artifact of a key is, or will be."""
    return run_dir / key.stage / key.fingerprint


def leftovers(run_dir: Path) -> list[Path]:
    """Scratch folders that killed processes left behind."""
    return sorted(path for path in run_dir.glob("*/.*") if path.suffix in {".partial", ".removed"})


def parsed_folders(run_dir: Path) -> list[Path]:
    """Folders of parsed chunks, which the next preprocess makes again where it needs them."""
    return sorted((run_dir / PARSED).glob("[0-9a-f]*"))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Who writes files here, where others may be writing the same ones."""

    suffix: str = ""
    claims: tuple[Path, ...] = ()


_alone = _Attempt()
_attempt: ContextVar[_Attempt] = ContextVar("attempt", default=_alone)


@contextlib.contextmanager
def attempt(claims: Sequence[Path] = ()) -> Iterator[None]:
    """Write under names of one's own inside the block, as others may be writing the same files at the same time.

    Whichever gets a file its real name last, it is whole.

    Args:
        claims: Of the process that asked for the work. Where one is gone, so is the process, or it stopped waiting:
            another may be at work with other settings, and no file gets its real name any more.
    """
    token = _attempt.set(_Attempt(f".{uuid.uuid4().hex}", tuple(claims)))
    try:
        yield
    finally:
        _attempt.reset(token)


def _partial_name(path: Path) -> Path:
    """Give the hidden name of a file that is being written."""
    return path.with_name(f".{path.name}{_attempt.get().suffix}.tmp")


def _reveal(partial: Path, path: Path) -> None:
    """Give a written file its real name, as soon as its content is on disk."""
    sync(partial)
    for claim in _attempt.get().claims:
        try:
            claim.open("rb").close()  # asks the server, where a look at the name may be answered by a cache
        except FileNotFoundError:
            partial.unlink(missing_ok=True)
            raise ArtifactError(
                f"`{path}` was not written: who asked for it no longer holds the folder", hint="nobody waits for it"
            ) from None
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is whole or absent."""
    partial = _partial_name(path)
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        _reveal(partial, path)


@contextlib.contextmanager
def write_atomically(path: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a hidden name to write; it gets its real name when the block ends without an error.

    Args:
        path: The real name.
        needed_bytes: What it takes, for the message when the disk is full; 0 where nobody knows.
    """
    partial = _partial_name(path)
    with wrap_write_errors(path, needed_bytes=needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _reveal(partial, path)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a whole file that will not change a second name, or make a copy where the file system has no links."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.hardlink_to(source)  # there at once and whole: what is whole under one name is so under the other
        except OSError:
            with write_atomically(path) as partial:
                shutil.copyfile(source, partial)


@contextlib.contextmanager
def wrap_write_errors(path: Path, *, needed_bytes: int = 0) -> Iterator[None]:
    """Turn failures of the operating system while writing into a `CapacityError` or `ArtifactError`."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if "No space left" in str(exc) or "quota" in str(exc).lower():
            needed = f"; it takes {show_bytes(needed_bytes)}" if needed_bytes else ""
            raise CapacityError(
                f"no space left while writing `{path}`{needed}, and {_show_free(path)} there",
                hint="free some disk, or choose another folder with --runs; finished parts are kept",
            ) from exc
        raise ArtifactError(
            f"cannot write `{path}`: {reason}", hint="choose a folder that can be written, with --runs or --out"
        ) from exc


def _show_free(path: Path) -> str:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            return f"{show_bytes(shutil.disk_usage(folder).free)} are free"
    return "nobody knows what is free"
