"""The Triton kernels against plain PyTorch: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.embedding.duplicates import sort_lookups
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.rows import update_rows

pytest.importorskip("triton", reason="needs triton: pip install triton")

from slipstream.embedding.tiers import kernels

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dim", [1, 3, 16, 128])
@pytest.mark.parametrize("num_lookups", [1, 37, 3000])
def test_gathered_rows_are_the_rows_of_the_buffer(device: str, dim: int, num_lookups: int):
    rng = np.random.default_rng(dim)
    positions = rng.integers(0, 500, num_lookups)
    found = sort_lookups(positions)
    buffer = torch.randn(500, dim, device=device)
    unique, inverse = (torch.from_numpy(part).to(device) for part in (found.unique, found.inverse))
    assert torch.equal(kernels.gather_rows(buffer, unique, inverse), buffer[torch.from_numpy(positions).to(device)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("dim", [1, 3, 16, 128])
def test_updates_equal_those_of_plain_pytorch(device: str, optimizer: str, dim: int, weighted: bool):
    torch.manual_seed(dim)
    weights, state = torch.randn(400, dim, device=device), torch.rand(400, device=device)
    positions = torch.randperm(399, device=device)[:300]
    gradients = torch.randn(300, dim, device=device)
    lr = torch.tensor(0.1, device=device)
    expected, expected_state = weights.clone(), state.clone()
    has_state = optimizer == "rowwise_adagrad"
    sample_weights = torch.rand(350, device=device) + 0.5 if weighted else None
    rule = OPTIMIZERS.get(optimizer)(eps=1e-8)
    update_rows(
        rule,
        expected,
        [expected_state] if has_state else [],
        positions,
        expected[positions],
        gradients.clone(),
        lr=lr,
        sample_weights=None if sample_weights is None else sample_weights[:300],
    )
    padded = torch.cat([positions, torch.full((50,), 399, device=device)])
    with_padding = torch.cat([gradients, torch.ones(50, dim, device=device)])
    kernels.update_rows(
        rule,
        weights,
        [state] if has_state else [],
        padded,
        with_padding,
        lr=lr,
        sample_weights=sample_weights,
        first_spare=399,
    )
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights, torch.zeros_like(weights))


def test_no_lookups_change_nothing(device: str):
    buffer, none = torch.ones(4, 2, device=device), torch.empty(0, dtype=torch.int64, device=device)
    assert kernels.gather_rows(buffer, none, none).shape == (0, 2)
    sgd = OPTIMIZERS.get("sgd")()
    kernels.update_rows(sgd, buffer, [], none, buffer[:0].clone(), lr=torch.tensor(1.0, device=device))
    assert torch.equal(buffer.cpu(), torch.ones(4, 2))


def test_a_rule_without_a_kernel_is_refused_by_name():
    rule, buffer = OPTIMIZERS.get("adam")(), torch.ones(4, 2)
    state = [torch.zeros(4, 2), torch.zeros(4, 2)]
    with pytest.raises(ValueError, match=r"found Adam, which has no Triton kernel"):
        kernels.update_rows(rule, buffer, state, torch.tensor([1]), torch.ones(1, 2), lr=torch.tensor(1.0))
