"""All dense layers moved by one kernel: equal to plain PyTorch, interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slipstream.training.dense_optimizer import DenseOptimizer

pytest.importorskip("triton", reason="needs triton: pip install triton")

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]),
]


def make_layers(device: str) -> nn.Module:
    """Layers of less than a block, of exactly one, and of several with a part of one behind them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 32), nn.Linear(32, 1), nn.Linear(16, 64, bias=False), nn.Linear(50, 61)).to(
        device
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_layers_move_as_in_plain_pytorch(name: str, weight_decay: float, device: str):
    layers = [make_layers(device) for _ in range(2)]
    plain, fused = (
        DenseOptimizer(each.parameters(), optimizer=name, eps=1e-8, weight_decay=weight_decay, fused=is_fused)
        for each, is_fused in zip(layers, (False, True), strict=True)
    )
    num_steps = torch.zeros((), dtype=torch.float64, device=device)
    for weight in (None, torch.tensor(1.3, device=device), None):
        num_steps += 1
        for one, other in zip(*(each.parameters() for each in layers), strict=True):
            one.grad = torch.randn(one.shape, device=device)
            other.grad = one.grad.clone()
        for way in (plain, fused):
            way.step(torch.tensor(0.01, device=device), num_steps=num_steps, sample_weight=weight)
    for one, other in zip(*(each.parameters() for each in layers), strict=True):
        torch.testing.assert_close(other, one, rtol=3e-7, atol=1e-7)
    for one, other in zip(fused.state, plain.state, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-7, atol=1e-7)


def test_a_parameter_that_moved_is_noticed():
    layers = nn.Linear(3, 2)
    optimizer = DenseOptimizer(layers.parameters(), optimizer="sgd", eps=0, fused=True)
    layers.weight.data = layers.weight.data.clone()
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="found one that moved"):
        optimizer.step(torch.tensor(0.1))
