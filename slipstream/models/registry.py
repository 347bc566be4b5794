"""Which models there are: every module of this folder with a subclass of `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from slipstream.models.model import Model
from slipstream.options import build
from slipstream.registry import Registry

MODELS: Final[Registry[type[Model]]] = Registry("model", package="slipstream.models", subclass_of="Model")
"""The options of an architecture, and what builds its network, by `model.name`."""


def read_model(description: Mapping[str, Any]) -> Model:
    """Make a model from a stored description.

    Args:
        description: Its `name` and options, as in section `[model]`; more keys do no harm.

    Raises:
        KeyError: There is no name.
        ValueError: No model has the name.
        ConfigError: An option is of a wrong type or out of range.
    """
    cls = MODELS.get(description["name"])
    own = {spec.name: description[spec.name] for spec in fields(cls) if spec.name in description}
    return build(cls, own, "model.")
