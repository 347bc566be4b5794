from __future__ import annotations

import pytest
import torch
from torch import nn

from slipstream.embedding.rules import OPTIMIZERS
from slipstream.training.dense_optimizer import DenseOptimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_it_equals_the_optimizer_of_torch(name: str, weight_decay: float, at_once: bool):
    torch.manual_seed(0)
    own, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(own.state_dict())
    options = {"eps": 1e-8, "weight_decay": weight_decay}
    ours = DenseOptimizer(own.parameters(), optimizer=name, at_once=at_once, **options)  # type: ignore[arg-type]
    num_steps = torch.zeros((), dtype=torch.float64)
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(theirs.parameters(), lr=0.1, weight_decay=weight_decay)
    elif name == "adam":
        reference = torch.optim.Adam(theirs.parameters(), lr=0.1, eps=1e-8, weight_decay=weight_decay)
    else:
        reference = torch.optim.Adagrad(theirs.parameters(), lr=0.1, eps=1e-8, weight_decay=weight_decay)
    for _ in range(20):
        for mine, yours in zip(own.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            yours.grad = mine.grad.clone()
        num_steps += 1
        ours.step(torch.tensor(0.1), num_steps=num_steps)
        reference.step()
    for mine, yours in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_all_at_once_and_one_by_one_give_the_same_bits(name: str):
    layers = [nn.Sequential(nn.Linear(13, 32), nn.Linear(32, 1)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    ways = [
        DenseOptimizer(each.parameters(), optimizer=name, eps=1e-8, weight_decay=1e-4, at_once=at_once)
        for each, at_once in zip(layers, (False, True), strict=True)
    ]
    num_steps = torch.zeros((), dtype=torch.float64)
    for weight in (None, torch.tensor(1.3), None):
        num_steps += 1
        for one, other in zip(*(each.parameters() for each in layers), strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for way in ways:
            way.step(torch.tensor(0.01), num_steps=num_steps, sample_weight=weight)
    for one, other in zip(*(each.parameters() for each in layers), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_may_change_from_step_to_step():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = DenseOptimizer([parameter], optimizer="sgd", eps=0)
    for lr, expected in ((0.0, 1.0), (0.5, 0.5), (0.25, 0.25)):
        parameter.grad = torch.ones(1)
        optimizer.step(torch.tensor(lr))
        assert parameter.item() == expected
    optimizer.zero_grad()
    assert parameter.grad is None


def test_a_missing_gradient_is_an_error():
    with pytest.raises(ValueError, match="call backward first"):
        DenseOptimizer([torch.nn.Parameter(torch.ones(1))], optimizer="sgd", eps=0).step(torch.tensor(0.1))
