from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from slipstream.errors import ConfigError
from slipstream.models.deepfm import DeepFM

DENSE, COLUMNS, DIM = 3, 4, 5


def make_network(num_dense: int = DENSE) -> torch.nn.Module:
    torch.manual_seed(0)
    network = DeepFM(embedding_dim=DIM, deep_mlp=(7, 6)).build(num_dense=num_dense, num_columns=COLUMNS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()  # so that no part is too small to be seen
    return network


def plain_logits(network: torch.nn.Module, dense: np.ndarray, rows: np.ndarray) -> list[float]:
    """One sample after the other, from the paper: sum of weights, every pair's dot product, MLP."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    logits = []
    for numbers, looked_up in zip(dense, rows, strict=True):
        fields = [number * row for number, row in zip(numbers, state["dense_rows"], strict=True)] + list(looked_up)
        vectors, first_order = [field[:DIM] for field in fields], [field[DIM] for field in fields]
        second_order = [a @ b for a, b in combinations(vectors, 2)]
        hidden = np.concatenate(vectors)
        for layer in (0, 2, 4):
            hidden = state[f"deep.{layer}.weight"] @ hidden + state[f"deep.{layer}.bias"]
            hidden = np.maximum(hidden, 0) if layer < 4 else hidden
        logits.append(sum(first_order) + sum(second_order) + hidden[0])
    return logits


@pytest.mark.parametrize("num_dense", [DENSE, 0])
def test_logits_equal_a_loop_over_pairs(num_dense: int, rng: np.random.Generator):
    network = make_network(num_dense)
    dense, rows = rng.normal(size=(6, num_dense)), rng.normal(size=(6, COLUMNS, DIM + 1))
    with torch.no_grad():
        logits = network(torch.tensor(dense, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32))
    assert logits.shape == (6,)
    np.testing.assert_allclose(logits.numpy(), plain_logits(network, dense, rows), rtol=1e-4, atol=1e-4)


def test_the_last_value_of_a_row_is_its_first_order_weight():
    network, rows = make_network(), torch.randn(2, COLUMNS, DIM + 1, requires_grad=True)
    network(torch.rand(2, DENSE), rows).sum().backward()
    assert rows.grad is not None
    assert (rows.grad[:, :, -1] == 1).all() and not (rows.grad[:, :, :-1] == 1).any()


def test_rows_have_a_place_for_the_weight():
    assert DeepFM(embedding_dim=16, deep_mlp=(4,)).row_width == 17


def test_gradients_reach_every_parameter():
    network = make_network()
    network(torch.rand(8, DENSE), torch.randn(8, COLUMNS, DIM + 1)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_an_mlp_of_no_layer_is_refused():
    with pytest.raises(ConfigError, match=r"`model\.deep_mlp` must be a list of positive widths, found \[\]"):
        DeepFM(deep_mlp=())
