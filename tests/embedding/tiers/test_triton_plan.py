"""What the device does in Triton against plain PyTorch: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategies import state_of
from torch import Tensor

from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers.batch_plan import BatchPlan
from slipstream.embedding.tiers.mapped import map_to_device
from slipstream.embedding.tiers.rows import TieredRows

pytest.importorskip("triton", reason="needs triton: pip install triton")

from slipstream.embedding.tiers import triton_plan
from slipstream.embedding.tiers.triton_plan import TritonPlan, has_kernel

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]),
]
NUM_ROWS, NUM_HOT, LOOKUPS = 40, 8, 384


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":  # each program takes the interpreter a millisecond
        monkeypatch.setattr(triton_plan, "_MOVERS", 3)
        monkeypatch.setattr(triton_plan, "_BLOCK", 128)  # which the lookups of a batch fill to the last
        monkeypatch.setattr(triton_plan, "_UPDATERS", 5)
    return torch.device(request.param)


def make_plans(make: type[BatchPlan], device: torch.device, *, optimizer: str, dim: int) -> tuple[Any, ...]:
    """Two plans over the same rows."""
    rows = TieredRows(
        num_rows=NUM_ROWS,
        num_hot=NUM_HOT,
        embedding_dim=dim,
        num_staged=2 * (NUM_ROWS - NUM_HOT),
        optimizer=optimizer,
        device=device,
        keeps_lead=True,
    )
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(NUM_ROWS, dim, generator=generator)
    state = [torch.rand(NUM_ROWS, *held.shape[1:], generator=generator) for held in rows.cold_state]
    rows.load(torch.arange(NUM_ROWS), weights, state)
    host = map_to_device(rows.on_host, device)
    options = {"num_lookups": LOOKUPS, "most_distinct": NUM_ROWS}
    return rows, *(make(rows, host, half=half, **options) for half in (0, 1))  # type: ignore[arg-type]


def draw_slots(seed: int, num_lookups: int) -> Tensor:
    """Runs of every length: one row has a third of the lookups, a few have one."""
    rng = np.random.default_rng(seed)
    slots = np.minimum(NUM_ROWS ** rng.random(num_lookups), NUM_ROWS - 1)
    slots[rng.random(num_lookups) < 0.3] = rng.integers(0, NUM_ROWS)
    return torch.from_numpy(slots.astype(np.int32))


def train(make: type[BatchPlan], device: torch.device, *, optimizer: str, dim: int, weighted: bool) -> list[Tensor]:
    """Three batches, the second of them short, the third with nothing behind it."""
    rows, now, following = make_plans(make, device, optimizer=optimizer, dim=dim)
    batches = [draw_slots(0, LOOKUPS), draw_slots(1, 70), draw_slots(2, LOOKUPS)]
    generator = torch.Generator().manual_seed(4)
    found: list[Tensor] = []
    now.load(batches[0].to(device))
    now.find(following)
    now.fetch()
    for number, slots in enumerate(batches):
        ahead = batches[number + 1] if number < 2 else None
        following.clear() if ahead is None else following.load(ahead.to(device))
        following.find(now)
        following.fetch()
        looked_up = now.look_up(len(slots))
        pulls = now.sum_by_row(torch.rand(len(slots), 4, generator=generator).to(device))
        num_distinct = int(now.sizes[0])
        seen = (looked_up, pulls[:num_distinct], now.padded_positions(), now.sizes, now.distinct[:num_distinct])
        found += [part.clone() for part in seen]
        now.update(
            rows.rule(eps=1e-6),
            torch.randn(len(slots), dim, generator=generator).to(device),
            lr=torch.tensor(0.1, device=device),
            num_steps=torch.tensor(number + 1.0, dtype=torch.float64, device=device),
            sample_weights=torch.rand(len(now.distinct), generator=generator).to(device) + 0.5 if weighted else None,
        )
        assert rows.buffer_lead is not None
        rows.buffer_lead[now.positions[:num_distinct]] += number + 1.0
        now.write_back()
        following.take_over(now)
        now, following = following, now
    every = torch.arange(NUM_ROWS)
    kept = [rows.gather(every), *state_of(rows, every), *(host.clone() for _, host in rows.pairs)]
    staged = [buffer[: rows.first_spare] for buffer, _ in rows.pairs]
    return [part.cpu() for part in (*found, *kept, *staged, torch.tensor([now.counted(), following.counted()]))]


@pytest.mark.parametrize(
    ("optimizer", "dim", "weighted"),
    [
        pytest.param("sgd", 1, False, marks=pytest.mark.slow),
        ("rowwise_adagrad", 16, True),
        ("adagrad", 3, True),
        ("adam", 128, False),
    ],
)
def test_kernels_in_place_equal_plain_pytorch(device: torch.device, optimizer: str, dim: int, weighted: bool):
    expected = train(BatchPlan, device, optimizer=optimizer, dim=dim, weighted=weighted)
    found = train(TritonPlan, device, optimizer=optimizer, dim=dim, weighted=weighted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_rows_looked_up_a_few_times_are_updated_to_the_bit(device: torch.device):
    found = []
    for make in (BatchPlan, TritonPlan):
        rows, now, before = make_plans(make, device, optimizer="sgd", dim=16)
        slots = torch.arange(NUM_ROWS, dtype=torch.int32).repeat(4)
        now.load(slots.to(device))
        now.find(before)
        now.fetch()
        gradients = torch.randn(len(slots), 16, generator=torch.Generator().manual_seed(1)).to(device)
        now.update(rows.rule(), gradients, lr=torch.tensor(0.1, device=device))
        now.write_back()
        found.append(rows.gather(torch.arange(NUM_ROWS)).cpu())
    if device.type == "cpu":  # a GPU adds pairs of lookups
        assert torch.equal(*found)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (4, 16)])
def test_programs_move_powers_of_two(shape: tuple[int, ...]):
    dim, at_once, width = triton_plan._shape_of_rows(torch.zeros(shape))
    assert dim == (1, *shape[1:])[-1] <= width < 2 * dim
    assert all(number & (number - 1) == 0 for number in (at_once, width))


def test_a_rule_of_ones_own_has_no_kernel():
    class Own(OPTIMIZERS.get("sgd")):  # type: ignore[misc]
        pass

    assert not has_kernel(Own)
    assert all(has_kernel(OPTIMIZERS.get(name)) for name in OPTIMIZERS.names())
