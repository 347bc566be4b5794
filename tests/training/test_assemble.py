from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategies import tiny_config

from slipstream.options import pick
from slipstream.training.assemble import Assembly, Settings, assemble
from slipstream.training.representations import TableSpec
from slipstream.training.slot_layout import SlotLayout

SIZES = {"cat_0": 40, "cat_1": 3, "cat_2": 77}
NUM_ROWS = sum(SIZES.values())


def put_together(*, num_hot: int, seed: int = 0, slots_seed: int = 0, **train: Any) -> Assembly:
    """Three tables, whose slots are drawn by `slots_seed`."""
    config = tiny_config(**{f"train__{name}": value for name, value in ({"batch_size": 2} | train).items()})
    slots = np.random.default_rng(slots_seed).permutation(NUM_ROWS).astype(np.int32)
    cuts = np.cumsum([0, *SIZES.values()])
    slot_maps = {name: slots[cuts[at] : cuts[at + 1]] for at, name in enumerate(SIZES)}
    return assemble(
        pick(Settings, config.train),
        layout=SlotLayout(slot_maps, num_hot=num_hot, table_of_column=range(3)),
        specs=[TableSpec(name=name, num_rows=size) for name, size in SIZES.items()],
        padding_rows={"cat_1": 2},
        counts=np.arange(NUM_ROWS),
        network=config.model,
        linear_bits=0,
        num_dense=2,
        seed=seed,
        device=torch.device("cpu"),
    )


def weights_of(parts: Assembly) -> list[torch.Tensor]:
    """Rows of each table in row order, then the dense layers."""
    tables = [parts.rows.gather(torch.from_numpy(slots)) for slots in parts.layout.slot_maps.values()]
    return [*tables, *(parameter.detach() for parameter in parts.model.parameters())]


@pytest.mark.parametrize("mode", ["resident", "baseline", "fae", "cached"])
def test_initial_weights_depend_on_the_seed_and_not_on_where_rows_live(mode: str):
    expected = weights_of(put_together(num_hot=7, mode="slipstream"))
    found = weights_of(put_together(num_hot=50, slots_seed=1, mode=mode))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    other = weights_of(put_together(num_hot=7, seed=1))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(other[:3], expected[:3], strict=True))


def test_a_padding_row_starts_at_zero_and_no_other_does():
    tables = weights_of(put_together(num_hot=7))[:3]
    assert [(table == 0).all(dim=1).nonzero().flatten().tolist() for table in tables] == [[], [2], []]


def test_padding_is_found_where_it_is_hot():
    parts = put_together(num_hot=NUM_ROWS)
    assert parts.padding_slots is not None
    assert parts.padding_slots.tolist() == [parts.layout.slot_maps["cat_1"][2]]
    assert put_together(num_hot=int(parts.padding_slots[0])).padding_slots is None


@pytest.mark.parametrize(
    ("train", "num_hot", "num_staged"),
    [
        ({"mode": "resident"}, NUM_ROWS, 0),
        ({"mode": "fae", "chunk_batches": 3}, 7, 2 * 3 * 6),
        ({"mode": "fae", "chunk_batches": 100}, 7, 2 * ((NUM_ROWS - 7) // 4)),  # a quarter of the cold rows
        ({"mode": "fae", "chunk_batches": 1}, 7, 2 * 6),  # 2 samples of 3 lookups
        ({"mode": "fae", "staging_rows": 10}, 7, 2 * 10),
        ({"mode": "fae", "staging_rows": 500}, 7, 2 * (NUM_ROWS - 7)),  # no more than there are
        ({"mode": "fae", "faithful": True, "chunk_batches": 16}, 0, 2 * (NUM_ROWS // 4)),
        ({"mode": "baseline", "chunk_batches": 1}, 0, 2 * 6),
        ({"mode": "cached", "cache_ratio": 0.5}, 0, NUM_ROWS // 2),
        ({"mode": "cached", "cache_ratio": 0.01}, 0, 2 * 6),  # two batches
    ],
)
def test_each_mode_has_rows_where_it_wants_them(train: dict[str, Any], num_hot: int, num_staged: int):
    rows = put_together(num_hot=7, **train).rows
    assert (rows.num_hot, rows.num_staged) == (num_hot, num_staged)
