"""Stacks of linear layers, which every model has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def make_mlp(widths: Sequence[int], *, relu_last: bool, zero_bias: bool = False) -> nn.Sequential:
    """Make linear layers with ReLU between them, initialised as DLRM's reference does.

    Args:
        widths: Width of the input, then of each layer.
        relu_last: Whether a ReLU follows the last layer too.
        zero_bias: Start biases at zero, so that weights and biases are Xavier's; else they are drawn.

    Source: Naumov et al., arXiv 1906.00091, with the initial weights of its reference code: normal, of
        variance 2/(in + out) for weights and 1/out for biases.
    """
    layers: list[nn.Module] = []
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        with warnings.catch_warnings():
            # without dense columns the first layer has no weights, and its bias is what is learnt
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            linear = nn.Linear(width_in, width_out)
            nn.init.normal_(linear.weight, std=(2.0 / (width_in + width_out)) ** 0.5)
        if zero_bias:
            nn.init.zeros_(linear.bias)
        else:
            nn.init.normal_(linear.bias, std=(1.0 / width_out) ** 0.5)
        layers.append(linear)
        if relu_last or index < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
