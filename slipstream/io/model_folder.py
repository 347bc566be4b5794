"""The folder of a trained model, as far as it can be read without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slipstream.errors import ArtifactError

FILES = WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
"""Of a model, weights first."""


def read_description(folder: Path) -> dict[str, Any]:
    """Say what model.json says.

    Raises:
        ArtifactError: It is missing, damaged, or of an older form.
    """
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError(f"{DESCRIPTION} holds a {type(description).__name__}")
    except (OSError, ValueError, RecursionError) as exc:
        raise ArtifactError(
            f"expected a trained model in `{folder}`: {exc}", hint="name the folder of a train artifact"
        ) from exc
    missing = [key for key in ("representations", "column_tables") if key not in description]
    if missing:
        raise ArtifactError(
            f"expected {' and '.join(missing)} in `{folder / DESCRIPTION}`, found none: it is of an older form",
            hint="train again: `slipstream train --force`",
        )
    return description
