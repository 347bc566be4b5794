"""Slots are renumbered where some tables have no rows in tiers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.io.samples import Samples
from slipstream.training.slot_layout import SlotLayout


@given(st.data())
def test_renumbering_keeps_rows_apart_and_hot_rows_first(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    total = sum(sizes)
    num_hot = data.draw(st.integers(0, total))
    tierless = data.draw(st.sets(st.sampled_from([f"cat_{at}" for at in range(len(sizes))])))
    slots = np.array(data.draw(st.permutations(range(total))), np.int32)
    cuts = np.cumsum([0, *sizes])
    slot_maps = {f"cat_{at}": slots[cuts[at] : cuts[at + 1]] for at in range(len(sizes))}
    layout = SlotLayout(slot_maps, num_hot=num_hot, table_of_column=range(len(sizes)), tierless=tierless)

    new = np.concatenate(list(layout.slot_maps.values()))
    assert sorted(new) == list(range(total))
    tiered = np.concatenate([np.full(size, f"cat_{at}" not in tierless) for at, size in enumerate(sizes)])
    assert np.array_equal(new < layout.num_rows, tiered)
    assert np.array_equal((new < layout.num_hot), tiered & (slots < num_hot))
    for name in tierless:
        assert np.array_equal(layout.slot_maps[name], layout.first_row[name] + np.arange(len(slot_maps[name])))
    rows = np.array([[data.draw(st.integers(0, size - 1)) for size in sizes] for _ in range(3)])
    old = np.stack([slot_maps[f"cat_{at}"][rows[:, at]] for at in range(len(sizes))], axis=1)
    moved = layout.translate(Samples(X_int=np.zeros((3, 1), np.float32), X_cat=old, y=np.zeros(3, np.float32)))
    expected = np.stack([layout.slot_maps[f"cat_{at}"][rows[:, at]] for at in range(len(sizes))], axis=1)
    assert np.array_equal(moved.X_cat, expected)
    counts = np.arange(total) * 10
    assert np.array_equal(layout.counts_by_slot(counts)[new[tiered]], counts[tiered])
