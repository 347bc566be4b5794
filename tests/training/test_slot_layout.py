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


@given(st.data())
def test_rows_of_a_tail_have_the_slot_of_row_0(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    total, cuts = sum(sizes), np.cumsum([0, *sizes])
    num_hot = data.draw(st.integers(len(sizes), total))
    # row 0 of every table is hot, the others are in some order
    rows = data.draw(st.permutations(sorted(set(range(total)) - set(cuts[:-1].tolist()))))
    slots = np.empty(total, np.int32)
    slots[[*cuts[:-1], *rows]] = np.arange(total)
    slot_maps = {f"cat_{at}": slots[cuts[at] : cuts[at + 1]] for at in range(len(sizes))}
    drawn = {name: data.draw(st.integers(1, len(of_table))) for name, of_table in slot_maps.items()}
    held = {name: count for name, count in drawn.items() if count < len(slot_maps[name])}
    layout = SlotLayout(slot_maps, num_hot=num_hot, table_of_column=range(len(sizes)), held=held)

    assert layout.is_whole
    new = [layout.held_slots(name) for name in slot_maps]
    assert [len(of_table) for of_table in new] == list(drawn.values())
    assert sorted(np.concatenate(new)) == list(range(layout.num_rows)), "a row that is held has a slot of its own"
    old = np.concatenate([of_table[: drawn[name]] for name, of_table in slot_maps.items()])
    assert np.array_equal(np.argsort(old), np.argsort(np.concatenate(new))), "in their old order"
    assert layout.num_hot == np.count_nonzero(old < num_hot)
    for name, count in drawn.items():
        assert (layout.slot_maps[name][count:] == layout.slot_maps[name][0]).all()
    counts = np.arange(total) + 1
    assert layout.counts_by_slot(counts)[[of_table[0] for of_table in new]].tolist() == [
        counts[start] + counts[start + drawn[name] : stop].sum()
        for name, start, stop in zip(slot_maps, cuts[:-1], cuts[1:], strict=True)
    ]
    lookups = np.stack([slots[cuts[:-1]], slots[cuts[1:] - 1]])
    moved = layout.translate(Samples(X_int=np.zeros((2, 1), np.float32), X_cat=lookups, y=np.zeros(2, np.float32)))
    assert moved.X_cat.tolist() == [[table[at] for table in layout.slot_maps.values()] for at in (0, -1)]
