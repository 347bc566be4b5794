"""The trained model on disk: safetensors and JSON, no pickles.

Tables are stored by name in row order, whatever was hot, so a model is the same file for every placement:

    model.safetensors   tables.cat_0 (N, D) … tables.cat_25, dense.bottom.0.weight …
    model.json          architecture and table sizes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slipstream.embedding.tiers import TieredRows
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import write_atomically, write_json
from slipstream.training.loop import iter_tables


def save_model(
    folder: Path,
    *,
    model: nn.Module,
    rows: TieredRows,
    slot_maps: Mapping[str, np.ndarray],
    description: Mapping[str, Any],
) -> None:
    """Write a model.

    Args:
        folder: Where to.
        model: The dense part.
        rows: The tiers, flushed.
        slot_maps: Slot of each row, per table.
        description: Goes to model.json.
    """
    tensors = {f"tables.{name}": weights for name, weights in iter_tables(rows, slot_maps)}
    tensors |= {f"dense.{name}": value.cpu().contiguous() for name, value in model.state_dict().items()}
    with write_atomically(folder / "model.safetensors") as path:
        save_file(tensors, path)
    write_json(folder / "model.json", dict(description))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a model.

    Raises:
        ArtifactError: Not a safetensors file.
    """
    try:
        return load_file(path)
    except Exception as exc:  # the library raises its own error, OSError or ValueError
        raise ArtifactError(f"expected a safetensors file at `{path}`: {exc}") from exc
