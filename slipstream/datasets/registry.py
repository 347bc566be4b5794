"""Which sources there are: every module of this folder that has a function `build(options) -> Source`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from slipstream.registry import Registry

if TYPE_CHECKING:
    from slipstream.datasets.source import Source, SourceOptions

SOURCES: Final[Registry[Callable[[SourceOptions], Source]]] = Registry(
    "source", package="slipstream.datasets", attribute="build"
)
"""What makes the reader of a raw format, by `dataset.source`; raises `DataError` where files are not of the format."""
