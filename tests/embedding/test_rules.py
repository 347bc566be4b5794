"""Every optimizer of rows, against torch's and against loops over one number after the other."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trained import run_on_copies

from slipstream.config import build_pipeline
from slipstream.embedding import CachedEmbeddingBag
from slipstream.embedding.rules import OPTIMIZERS, RowOptimizer
from slipstream.errors import ConfigError

TREE = {
    "name": "toy",
    "dataset": {"source": "synthetic", "num_samples": 2000},
    "segregate": {"hot_budget": "30%"},
    "model": {"embedding_dim": 4, "bottom_mlp": [4], "top_mlp": [1]},
}
N, D, LR = 9, 3, 0.1
STEPS = torch.zeros((), dtype=torch.float64)


def train_lazily(name: str, gradients: Tensor, looked_up: list[list[int]], weights: list[Tensor] | None) -> Tensor:
    """Rows of a table, updated through `row_directions`; returns weights and state side by side."""
    rule = OPTIMIZERS.get(name)(eps=1e-8)
    table = torch.linspace(-1, 1, N * D).view(N, D).clone()
    state = [torch.zeros(shape) for shape in rule.state_shapes(table.shape).values()]
    steps = STEPS.clone()
    for at, rows in enumerate(looked_up):
        steps += 1
        index = torch.tensor(rows, dtype=torch.int64)
        moved = rule.row_directions(
            state,
            index,
            gradients[at, index].clone(),
            num_steps=steps,
            sample_weights=None if weights is None else weights[at][index],
        )
        table[index] -= LR * moved
    return torch.cat([table, *(one.view(N, -1) for one in state)], dim=1)


def plain_sgd(g: list[float], state: list[list[float]], m: float, t: int) -> list[float]:
    return g


def plain_adagrad(g: list[float], state: list[list[float]], m: float, t: int) -> list[float]:
    (sums,) = state
    for at, value in enumerate(g):
        sums[at] += value**2 / m
    return [value / (math.sqrt(total) + 1e-8) for value, total in zip(g, sums, strict=True)]


def plain_rowwise_adagrad(g: list[float], state: list[list[float]], m: float, t: int) -> list[float]:
    (sums,) = state
    sums[0] += sum(value**2 for value in g) / len(g) / m
    return [value / (math.sqrt(sums[0]) + 1e-8) for value in g]


def plain_adam(g: list[float], state: list[list[float]], m: float, t: int) -> list[float]:
    first, second = state
    for at, value in enumerate(g):
        first[at] = 0.9 * first[at] + 0.1 * value
        second[at] = 0.999 * second[at] + 0.001 * value**2 / m
    scale = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    return [scale * a / (math.sqrt(b) + 1e-8) for a, b in zip(first, second, strict=True)]


PLAIN: dict[str, Callable[[list[float], list[list[float]], float, int], list[float]]] = {
    "sgd": plain_sgd,
    "adagrad": plain_adagrad,
    "rowwise_adagrad": plain_rowwise_adagrad,
    "adam": plain_adam,
}


def test_every_optimizer_has_a_plain_loop_here():
    assert set(PLAIN) == set(OPTIMIZERS.names())


@pytest.mark.parametrize("name", PLAIN)
@given(
    looked_up=st.lists(st.lists(st.integers(0, N - 1), unique=True, max_size=N), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_rows_and_state_equal_a_loop_over_single_numbers(
    name: str, looked_up: list[list[int]], seed: int, weighted: bool
):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(looked_up), N, D, generator=generator)
    weights = [torch.rand(N, generator=generator) + 0.5 for _ in looked_up] if weighted else None
    found = train_lazily(name, gradients, looked_up, weights)

    table = torch.linspace(-1, 1, N * D).view(N, D).tolist()
    shapes = OPTIMIZERS.get(name).state_shapes((N, D)).values()
    state = [[[0.0] * math.prod(shape[1:]) for _ in range(N)] for shape in shapes]
    for at, rows in enumerate(looked_up):
        for row in rows:
            m = 1.0 if weights is None else float(weights[at][row])
            moved = PLAIN[name](gradients[at, row].tolist(), [one[row] for one in state], m, at + 1)
            table[row] = [value - LR * way for value, way in zip(table[row], moved, strict=True)]
    expected = [sum((one[row] for one in state), start=table[row]) for row in range(N)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda table: torch.optim.SparseAdam([table], lr=LR, eps=1e-8)),
        ("adagrad", lambda table: torch.optim.Adagrad([table], lr=LR, eps=1e-8)),
        ("sgd", lambda table: torch.optim.SGD([table], lr=LR)),
    ],
)
def test_sparse_gradients_of_torch_lead_to_the_same_rows(
    name: str, make: Callable[[torch.nn.Parameter], torch.optim.Optimizer]
):
    generator = torch.Generator().manual_seed(0)
    looked_up = [[0, 3], [3], [1, 2, 8], [0], [3, 0, 5]] * 5
    gradients = torch.randn(len(looked_up), N, D, generator=generator)
    table = torch.nn.Parameter(torch.linspace(-1, 1, N * D).view(N, D).clone())
    reference = make(table)
    for at, rows in enumerate(looked_up):
        with torch.sparse.check_sparse_tensor_invariants():
            table.grad = torch.sparse_coo_tensor(torch.tensor([rows]), gradients[at, rows], (N, D))
            reference.step()
    torch.testing.assert_close(train_lazily(name, gradients, looked_up, None)[:, :D], table.detach())


def test_what_is_not_said_is_as_in_torch():
    adagrad, adam = (inspect.signature(one).parameters for one in (torch.optim.Adagrad, torch.optim.Adam))
    defaults = {name: OPTIMIZERS.get(name)() for name in ("adagrad", "rowwise_adagrad", "adam")}
    assert defaults["adagrad"].eps == defaults["rowwise_adagrad"].eps == adagrad["eps"].default
    assert defaults["adam"].eps == adam["eps"].default
    assert defaults["adam"].betas == adam["betas"].default
    of_bag = inspect.signature(CachedEmbeddingBag).parameters
    assert (of_bag["lr"].default, of_bag["betas"].default) == (adagrad["lr"].default, adam["betas"].default)


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad", "adam"])
def test_a_weighted_sample_leaves_the_squares_of_as_many_samples(name: str):
    """One gradient of m samples counts m squares: what m samples leave, and in Adam what they leave on average."""
    rule, m = OPTIMIZERS.get(name)(), 3.0
    gradient = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    squares = []
    for factor, weights in ((1.0, None), (m, torch.tensor([m]))):
        state = [torch.zeros(shape) for shape in rule.state_shapes((1, D)).values()]
        rule.direction(gradient * factor, state, num_steps=STEPS + 1, sample_weights=weights)
        squares.append(state[-1])
    torch.testing.assert_close(squares[1], m * squares[0])


def test_bytes_of_state_follow_from_its_shapes():
    assert {name: OPTIMIZERS.get(name).state_bytes(16) for name in OPTIMIZERS.names()} == {
        "sgd": 0,
        "adagrad": 64,
        "rowwise_adagrad": 4,
        "adam": 128,
    }


def test_a_rule_with_state_per_row_must_say_what_becomes_of_layers():
    class PerRow(RowOptimizer):
        state: ClassVar = {"norm": "row"}

        def direction(self, gradients: Tensor, *args: object, **options: object) -> Tensor:
            return gradients

    with pytest.raises(TypeError, match=r"PerRow.elementwise to name a rule without state per row"):
        PerRow.elementwise()
    assert OPTIMIZERS.get("rowwise_adagrad").elementwise() is OPTIMIZERS.get("adagrad")


def test_optimizers_are_known_without_torch():
    code = "import slipstream.embedding.rules, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class SignSGD(RowOptimizer):
    """The sign of the gradient: an optimizer of one's own."""

    def direction(self, gradients: Tensor, *args: object, **options: object) -> Tensor:
        return gradients.sign()


def test_an_optimizer_of_ones_own_trains_the_same_rows_in_every_mode_through_the_registry_alone(tmp_path: Path):
    models = []
    with OPTIMIZERS.registered("sign_sgd", SignSGD):
        for name in ("sign_sgd", "sgd"):
            for mode in ("resident", "slipstream"):
                train = {"mode": mode, "optimizer": name, "batch_size": 64, "lr": 0.001, "num_threads": 1}
                skip = {"criterion": "none"}
                result = run_on_copies(build_pipeline(TREE | {"train": train, "skip": skip}), tmp_path)
                models.append((result.stages["train"].artifact.path / "model.safetensors").read_bytes())
    assert models[0] == models[1] != models[2] == models[3]
    with pytest.raises(ConfigError, match=r"`train\.optimizer` must be one of sgd, .* found 'sign_sgd'"):
        build_pipeline(TREE | {"train": {"optimizer": "sign_sgd"}})
