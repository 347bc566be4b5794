from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from slipstream.errors import ConfigError
from slipstream.models.dcnv2 import DCNv2

DENSE, COLUMNS, DIM = 3, 2, 4
WIDTH = DENSE + COLUMNS * DIM


def make_network(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = DCNv2(embedding_dim=DIM, cross_layers=2, deep_mlp=(7, 6), **options)
    network = model.build(num_dense=DENSE, num_columns=COLUMNS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)  # so that no part is too small to be seen
    return network


def plain_logits(network: torch.nn.Module, dense: np.ndarray, rows: np.ndarray, *, is_parallel: bool) -> list[float]:
    """One sample after the other, from the paper: x = x_0 * (W x + b) + x, number by number."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    logits = []
    for numbers, looked_up in zip(dense, rows, strict=True):
        given = [*numbers, *looked_up.ravel()]
        crossed = list(given)
        for layer in range(2):
            if f"cross.{layer}.weight" in state:
                matrix, bias = state[f"cross.{layer}.weight"], state[f"cross.{layer}.bias"]
            else:
                matrix = state[f"cross.{layer}.1.weight"] @ state[f"cross.{layer}.0.weight"]
                bias = state[f"cross.{layer}.1.bias"]
            mixed = [sum(matrix[i, j] * crossed[j] for j in range(WIDTH)) + bias[i] for i in range(WIDTH)]
            crossed = [given[i] * mixed[i] + crossed[i] for i in range(WIDTH)]
        hidden = np.array(given if is_parallel else crossed)
        for layer in (0, 2):
            hidden = np.maximum(state[f"deep.{layer}.weight"] @ hidden + state[f"deep.{layer}.bias"], 0)
        joined = np.concatenate([crossed, hidden]) if is_parallel else hidden
        logits.append(float((state["last.0.weight"] @ joined + state["last.0.bias"])[0]))
    return logits


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
@pytest.mark.parametrize("cross_rank", [0, 3])
def test_logits_equal_a_plain_loop(cross_rank: int, structure: str, rng: np.random.Generator):
    network = make_network(cross_rank=cross_rank, structure=structure)
    dense, rows = rng.normal(size=(6, DENSE)), rng.normal(size=(6, COLUMNS, DIM))
    with torch.no_grad():
        logits = network(torch.tensor(dense, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32))
    assert logits.shape == (6,)
    expected = plain_logits(network, dense, rows, is_parallel=structure == "parallel")
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_two_layers_cross_three_inputs_and_no_more():
    network, scale = make_network(structure="parallel"), torch.linspace(-2, 2, 9, dtype=torch.float64)
    network.double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias" in name or name.startswith("deep"):
                parameter.zero_()  # what is left is a polynomial of the input
        point = torch.randn(1, WIDTH, dtype=torch.float64) * scale.unsqueeze(1)
        logits = network(point[:, :DENSE], point[:, DENSE:].view(len(scale), COLUMNS, DIM))
    coefficients = np.polynomial.polynomial.polyfit(scale.numpy(), logits.numpy(), 5)
    assert np.abs(coefficients[3]) > 1e-3 and np.abs(coefficients[4:]).max() < 1e-9


@pytest.mark.parametrize("options", [{}, {"structure": "parallel", "cross_rank": 2}])
def test_gradients_reach_rows_and_every_parameter(options: dict[str, Any]):
    network, rows = make_network(**options), torch.randn(8, COLUMNS, DIM, requires_grad=True)
    network(torch.rand(8, DENSE), rows).sum().backward()
    assert rows.grad is not None and rows.grad.any(dim=0).all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_low_rank_makes_cross_layers_small():
    full, narrow = (make_network(cross_rank=rank).get_submodule("cross") for rank in (0, 2))
    sizes = [sum(parameter.numel() for parameter in layers.parameters()) for layers in (full, narrow)]
    assert sizes == [2 * (WIDTH * WIDTH + WIDTH), 2 * (2 * 2 * WIDTH + WIDTH)]


@pytest.mark.parametrize("options", [{"cross_layers": 0}, {"cross_rank": -1}, {"deep_mlp": ()}, {"deep_mlp": (4, 0)}])
def test_options_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"`model.{next(iter(options))}` must be"):
        DCNv2(**options)
