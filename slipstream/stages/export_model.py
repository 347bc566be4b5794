"""Export a model: a trained one with its fp32 tables rounded and packed.

Reads   train/        model.safetensors, model.json
Writes  a folder      a whole model too: the same two files, fp32 tables as int8 or int4; and vocab/
Keeps   dense layers, cores, and tables that were trained on few bits, as they are
Costs   one pass over the tables; memory for the tables twice
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.artifacts import Artifact, link_or_copy
from slipstream.models.registry import read_model
from slipstream.training.model_file import FILES, quantize_model, read_description
from slipstream.training.representations import BITS


def run(trained: Artifact, *, representation: str, out_dir: Path) -> dict[str, Any]:
    """Round the fp32 tables of a trained model, one exact scale each, and write the model packed.

    Args:
        trained: The train artifact.
        representation: `int8` or `int4`.
        out_dir: Folder to write to; must not hold a model yet.

    Returns:
        Bytes of the weights before and after, and how each table is held now.

    Raises:
        ArtifactError: The artifact is not of stage train, or damaged.
        ConfigError: The model cannot be rounded so, or there is a model in `out_dir`.
    """
    if trained.manifest["stage"] != "train":
        raise ArtifactError(
            f"expected a train artifact, found one of stage `{trained.manifest['stage']}` at `{trained.path}`",
            hint="its folder is <runs>/<name>/train/<fingerprint>",
        )
    known = [name for name, bits in BITS.items() if bits]
    if representation not in known:
        raise ConfigError(f"expected one of {', '.join(known)}, found `{representation}`")
    for name in FILES:
        trained.check(trained.path / name)
        if (out_dir / name).exists():
            raise ConfigError(f"there is a model in `{out_dir}` already", hint="name another folder, or remove it")
    width = read_model(read_description(trained.path)).row_width
    if BITS[representation] == 4 and width % 2:
        raise ConfigError(
            f"int4 puts two values in a byte, and the model's rows have {width}", hint="use --quantize int8"
        )
    quantize_model(trained.path, out_dir, representation=representation)
    for name in trained.manifest["outputs"]:
        if name.startswith("vocab/"):
            link_or_copy(trained.check(trained.path / name), out_dir / name)
    weights = FILES[0]
    before, after = (folder.joinpath(weights).stat().st_size for folder in (trained.path, out_dir))
    return {
        "output": str(out_dir),
        "bytes": after,
        "bytes_before": before,
        "representations": read_description(out_dir)["representations"],
    }
