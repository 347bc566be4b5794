from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from slipstream.models.tbsm import TBSM

STEPS, SHARED, FEATURES, DIM = 5, 1, 2, 4
COLUMNS = SHARED + STEPS * FEATURES


def make_model(num_steps: int = STEPS, num_columns: int = COLUMNS) -> torch.nn.Module:
    torch.manual_seed(3)
    options = TBSM(embedding_dim=DIM, bottom_mlp=(6, DIM), step_mlp=(7, 7), attention_mlp=(6,), top_mlp=(8, 1))
    return options.build(num_dense=num_steps, num_columns=num_columns)


def make_inputs(num_samples: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    dense = torch.rand(num_samples, STEPS, generator=generator)
    return dense, torch.randn(num_samples, COLUMNS, DIM, generator=generator)


def test_logits_are_those_of_steps_taken_in_turn():
    model, (dense, looked_up) = make_model(), make_inputs()
    looked_up[:4, 1:5] = 0.0  # two padded steps
    expected = []
    for sample in range(len(dense)):
        vectors = []
        for step in range(STEPS):
            columns = [0, *range(1 + FEATURES * step, 1 + FEATURES * (step + 1))]
            vector = model.step(dense[sample : sample + 1, step : step + 1], looked_up[sample : sample + 1, columns])
            vectors.append(normalize(torch.relu(vector), dim=1)[0])
            if not looked_up[sample, columns[1:]].any():
                vectors[-1] = torch.zeros_like(vectors[-1])
        query = model.inner.T @ (model.inner @ vectors[-1])
        weights = torch.sigmoid(model.attention(torch.stack([vector @ query for vector in vectors[:-1]])))
        context = sum(weight * vector for weight, vector in zip(weights, vectors[:-1], strict=True))
        expected.append(model.top(torch.cat([context, vectors[-1]]))[0])
    torch.testing.assert_close(model(dense, looked_up), torch.stack(expected))


def test_padding_gets_no_gradient_and_changes_nothing():
    model, (dense, looked_up) = make_model(), make_inputs()
    looked_up[:, 1:5] = 0.0
    looked_up.requires_grad_()
    before = model(dense, looked_up)
    before.sum().backward()
    assert looked_up.grad is not None
    assert not looked_up.grad[:, 1:5].any() and looked_up.grad[:, 5:].any()
    other = dense.clone()
    other[:, :2] = 7.0
    torch.testing.assert_close(model(other, looked_up), before)


@pytest.mark.parametrize(("num_steps", "num_columns"), [(1, 11), (5, 4)])
def test_there_are_two_steps_at_least_and_each_has_a_column(num_steps: int, num_columns: int):
    with pytest.raises(ValueError, match="expected two steps or more, with a column each"):
        make_model(num_steps, num_columns)


def test_it_learns_whether_the_candidate_was_in_the_history():
    generator = torch.Generator().manual_seed(6)
    model = make_model()
    table = torch.nn.Embedding(12, DIM)
    torch.nn.init.normal_(table.weight, generator=generator)
    items = torch.randint(12, (512, STEPS), generator=generator)
    items[:, :-1] = items[:, :1]  # a user looks at one thing only
    items[::2, -1] = items[::2, 0]
    labels = (items[:, -1] == items[:, 0]).float()
    optimizer = torch.optim.Adam([*model.parameters(), *table.parameters()], lr=0.01)
    columns = torch.cat([torch.zeros(512, 1, dtype=torch.int64), items.repeat_interleave(FEATURES, dim=1)], dim=1)
    for _ in range(150):
        loss = binary_cross_entropy_with_logits(model(torch.zeros(512, STEPS), table(columns)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35
