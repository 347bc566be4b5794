"""The JSON document of a run, as `--json` prints it."""

from __future__ import annotations

from typing import Any

from slipstream.pipeline import RunResult
from slipstream.stage import row_bytes_of


def run_document(result: RunResult) -> dict[str, Any]:
    """Return what became of a run as plain values."""
    stages: dict[str, Any] = {}
    for name, stage in result.stages.items():
        counts = dict(stage.artifact.counts)
        if name == "segregate":
            samples = counts.pop("samples")
            counts |= {"hot_samples": samples["hot"], "cold_samples": samples["cold"]}
            counts |= {"val_samples": samples["val"], "test_samples": samples["test"]}
            counts["bytes"] = counts["hot_rows"] * row_bytes_of(result.config)
        stages[name] = {
            "status": stage.status,
            "reason": stage.reason,
            "seconds": round(stage.seconds, 3),
            "output": str(stage.artifact.path),
            **without_nan(counts),
        }
    return {
        "name": result.config.name,
        "run_dir": str(result.run_dir),
        "warnings": result.warnings,
        "stages": stages,
    }


def without_nan(value: Any) -> Any:
    """Return the same value with null for every NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
