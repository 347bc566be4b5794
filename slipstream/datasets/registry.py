"""Which sources there are. Adding one is adding its module and a line here (and its name to `dataset.source`)."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from slipstream.datasets.source import Source, SourceOptions

SOURCES: Final = {
    "synthetic": "criteo",  # its generator writes Criteo's format
    "criteo": "criteo",
    "avazu": "avazu",
    "taobao": "taobao",
    "dlrm_npz": "dlrm_npz",
}
"""Module of `slipstream.datasets` that reads each `dataset.source`; it has a function `build(options) -> Source`."""


def build_source(name: str, options: SourceOptions) -> Source:
    """The source of a name.

    Raises:
        DataError: Its files are not of the format.
        KeyError: There is no such source.
    """
    module = import_module(f"slipstream.datasets.{SOURCES[name]}")
    source: Source = module.build(options)
    return source
