from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from slipstream.errors import ConfigError
from slipstream.models.dlrm import DLRM
from slipstream.models.mlp import make_mlp


def make_model(num_tables: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return DLRM(embedding_dim=5, bottom_mlp=(6, 5), top_mlp=(7, 1)).build(num_dense=3, num_columns=num_tables)


def plain_forward(model: torch.nn.Module, dense: np.ndarray, looked_up: np.ndarray) -> list[float]:
    """One sample after the other, from the paper: MLP, every pair's dot product, MLP."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def mlp(name: str, vector: np.ndarray, relu_last: bool) -> np.ndarray:
        weights = sorted(key for key in state if key.startswith(name) and key.endswith("weight"))
        for index, key in enumerate(weights):
            vector = state[key] @ vector + state[key.replace("weight", "bias")]
            if relu_last or index < len(weights) - 1:
                vector = np.maximum(vector, 0)
        return vector

    logits = []
    for numbers, rows in zip(dense, looked_up, strict=True):
        bottom = mlp("bottom", numbers, relu_last=True)
        vectors = [bottom, *rows]
        # row by row of the lower triangle
        pairs = sorted(combinations(range(len(vectors)), 2), key=lambda pair: (pair[1], pair[0]))
        products = [vectors[a] @ vectors[b] for a, b in pairs]
        logits.append(float(mlp("top", np.concatenate([bottom, products]), relu_last=False)[0]))
    return logits


@pytest.mark.parametrize("num_tables", [1, 4])
def test_logits_equal_a_plain_loop(num_tables: int, rng: np.random.Generator):
    model = make_model(num_tables)
    dense, looked_up = rng.normal(size=(6, 3)), rng.normal(size=(6, num_tables, 5))
    with torch.no_grad():
        logits = model(torch.tensor(dense, dtype=torch.float32), torch.tensor(looked_up, dtype=torch.float32))
    assert logits.shape == (6,)
    np.testing.assert_allclose(logits.numpy(), plain_forward(model, dense, looked_up), rtol=1e-4, atol=1e-5)


def test_gradients_reach_rows_and_every_parameter():
    model = make_model()
    looked_up = torch.randn(8, 4, 5, requires_grad=True)
    model(torch.rand(8, 3), looked_up).sum().backward()
    assert looked_up.grad is not None and (looked_up.grad != 0).any(dim=2).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_samples_do_not_influence_each_other():
    model = make_model()
    dense, looked_up = torch.rand(5, 3), torch.randn(5, 4, 5)
    torch.testing.assert_close(model(dense, looked_up)[2:3], model(dense[2:3], looked_up[2:3]))


def test_the_bottom_must_end_in_the_width_of_a_row():
    with pytest.raises(ConfigError, match=r"ends in embedding_dim = 4, found \[8, 5\]"):
        DLRM(embedding_dim=4, bottom_mlp=(8, 5), top_mlp=(1,))


def test_initial_weights_have_the_spread_of_the_reference():
    torch.manual_seed(0)
    first, *_, last = (layer for layer in make_mlp([300, 200, 100], relu_last=True) if hasattr(layer, "weight"))
    for layer in (first, last):
        width_out, width_in = layer.weight.shape
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (width_in + width_out)) ** 0.5, rel=0.02)
        assert float(layer.bias.detach().std()) == pytest.approx(width_out**-0.5, rel=0.2)


def test_only_parameters_are_stored():
    assert set(make_model().state_dict()) == {
        f"{part}.{layer}.{kind}" for part in ("bottom", "top") for layer in (0, 2) for kind in ("weight", "bias")
    }
