"""A model from its name and plain values, so that a stored description is enough to build it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slipstream.models.dlrm import DLRM
from slipstream.models.tbsm import TBSM


def build_model(description: Mapping[str, Any], *, num_dense: int, num_columns: int) -> nn.Module:
    """Build a model.

    Args:
        description: Its `name` and widths, as in section `model` of a pipeline; more keys do no harm.
        num_dense: Dense columns.
        num_columns: Looked-up columns.
    """
    widths = {key: description[key] for key in ("embedding_dim", "bottom_mlp", "top_mlp")}
    if description["name"] == "tbsm":
        return TBSM(
            num_steps=num_dense,
            num_columns=num_columns,
            num_shared=num_columns % num_dense,
            step_mlp=description["step_mlp"],
            attention_mlp=description["attention_mlp"],
            **widths,
        )
    return DLRM(num_dense=num_dense, num_tables=num_columns, **widths)
