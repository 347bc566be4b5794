"""Pipelines that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from slipstream.errors import ConfigError


def find_pipeline(name: str) -> Path:
    """Find a shipped pipeline by its name, whatever is called like it in the working folder, or a file.

    Raises:
        ConfigError: There is neither.
    """
    for shipped in shipped_pipelines():
        if shipped.stem == name:
            return shipped
    path = Path(name)
    if path.exists() or path.suffix == ".toml":
        return path
    raise ConfigError(
        f"expected a pipeline file or the name of a shipped pipeline, found `{name}`",
        hint="shipped pipelines: " + ", ".join(sorted(path.stem for path in shipped_pipelines())),
    )


def shipped_pipelines() -> list[Path]:
    """Give the files of all shipped pipelines: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return [*(package / "pipelines").glob("*.toml"), *(package.parent / "pipelines").glob("*.toml")]
