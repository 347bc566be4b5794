"""Export a model: as it is, with its fp32 tables rounded and packed, or in the format of another program.

Reads   a model's folder    a train artifact, or a model exported before
Writes  a folder            a whole model too; `int8` or `int4` rounds its fp32 tables
        or one file         ONNX or torch.export: opened again and compared before it gets its name
Keeps   dense layers, cores, and tables that were trained on few bits, as they are
Costs   one pass over the tables; memory for the tables twice
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipstream.embedding.quantized.numbers import values_per_byte
from slipstream.errors import ConfigError
from slipstream.io.artifacts import MANIFEST, link_or_copy, open_artifact, write_json
from slipstream.io.capacity import on_same_disk, require_disk, require_memory
from slipstream.io.model_folder import FILES, read_description
from slipstream.models.registry import read_model
from slipstream.schema import BITS
from slipstream.serving.export import FORMATS, write_portable
from slipstream.serving.model import ServedModel
from slipstream.training.model_file import quantize_model

_BESIDE = ("vocab/*", "past/*", "examples.npz")
"""What a model brings along beside its weights and its description."""


def run(source: Path, *, out: Path, representation: str | None = None, format_name: str = "folder") -> dict[str, Any]:
    """Write a trained model elsewhere.

    Args:
        source: Folder of the model.
        out: Folder to write to, or the file for a format other than `folder`; must not be there yet.
        representation: `int8` or `int4` rounds fp32 tables, one exact scale each; None leaves them.
        format_name: `folder`, `onnx` or `torch`.

    Returns:
        Where it is, its bytes, those of the weights before, and what else is known of it.

    Raises:
        ArtifactError: The folder holds no whole model, or was altered.
        CapacityError: Memory or disk would not do.
        ConfigError: The model cannot be written so, or there is one already.
    """
    files = _files_of(source)
    before = (source / FILES[0]).stat().st_size
    _check_capacity(before, source, out, is_linked=format_name == "folder" and representation is None)
    if format_name == "folder":
        return {"bytes_before": before, **_write_folder(source, files, out, representation)}
    if representation is not None:
        raise ConfigError(
            f"rounding to {representation} and format `{format_name}` are two steps",
            hint="export the rounded model to a folder first, then that folder to the other format",
        )
    if format_name not in FORMATS.names():
        raise ConfigError(f"expected --format folder, {', '.join(FORMATS.names())}; found `{format_name}`")
    return {"bytes_before": before, **write_portable(ServedModel(source), out, name=format_name)}


def _check_capacity(weight_bytes: int, source: Path, out: Path, *, is_linked: bool) -> None:
    """Refuse what has no room: a file that is written anew is in memory as read and as written."""
    hint = "free some disk, or name a folder on a larger one with --out"
    if not is_linked:
        require_memory(2 * weight_bytes, purpose="export of a model", hint="export on a machine with more memory")
        require_disk(out, weight_bytes, purpose="export of a model", hint=hint)
    elif not on_same_disk(source, out):
        require_disk(out, weight_bytes, purpose="export of a model", hint=hint)


def _files_of(source: Path) -> list[str]:
    """Names of a model's files, compared with the manifest where there is one."""
    read_description(source)
    names = [path.relative_to(source).as_posix() for pattern in _BESIDE for path in sorted(source.glob(pattern))]
    if (source / MANIFEST).exists():
        artifact = open_artifact(source)
        for name in (*FILES, *names):
            artifact.check(source / name)
    return names


def _write_folder(source: Path, beside: list[str], out: Path, representation: str | None) -> dict[str, Any]:
    if any((out / name).exists() for name in FILES):
        raise ConfigError(f"there is a model in `{out}` already", hint="name another folder, or remove it")
    # the description comes last: a folder without one is no model
    weights, description = FILES
    for name in beside:
        link_or_copy(source / name, out / name)
    described = read_description(source) | _provenance(source)
    if representation is None:
        link_or_copy(source / weights, out / weights)
        write_json(out / description, described)
    else:
        _check_representation(source, representation)
        quantize_model(source, out, representation=representation, description=described)
    return {
        "output": str(out),
        "bytes": (out / weights).stat().st_size,
        "representations": read_description(out)["representations"],
    }


def _provenance(source: Path) -> dict[str, Any]:
    """Give what the manifest of a train artifact says of the model, for a folder that has none."""
    if not (source / MANIFEST).exists():
        return {}
    trained = open_artifact(source)
    metrics = {split: trained.counts[split] for split in ("test", "val") if split in trained.counts}
    made_by = {"slipstream": trained.manifest["slipstream"], "fingerprint": trained.fingerprint, "metrics": metrics}
    return {"trained": made_by}


def _check_representation(source: Path, representation: str) -> None:
    known = [name for name, bits in BITS.items() if bits]
    if representation not in known:
        raise ConfigError(f"expected one of {', '.join(known)}, found `{representation}`")
    width = read_model(read_description(source)).row_width
    per_byte = values_per_byte(BITS[representation])
    if width % per_byte:
        raise ConfigError(
            f"{representation} puts {per_byte} values in a byte, and the model's rows have {width}",
            hint="use --quantize int8",
        )
