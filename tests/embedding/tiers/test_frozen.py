"""Frozen rows: what is read is what was there at the start, whatever changes while it is read."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.embedding.tiers import frozen as module
from slipstream.embedding.tiers.frozen import FrozenRows


@pytest.fixture(autouse=True)
def _blocks_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2 * 3 * 4)


@given(
    st.integers(0, 9),
    st.sets(st.integers(0, 8)),
    st.lists(st.sets(st.integers(0, 8), min_size=1) | st.none(), max_size=12),
)
def test_what_is_read_is_what_was_there(num_rows: int, elsewhere: set[int], events: list[set[int] | None]):
    rows = torch.arange(3.0 * num_rows).reshape(num_rows, 3)
    frozen, expected = FrozenRows(rows), rows.clone()
    replaced = np.array([row for row in elsewhere if row < num_rows], np.int64)[::-1].copy()
    expected[replaced] = -7.0
    frozen.replace(replaced, torch.full((len(replaced), 3), -7.0))
    blocks, found = frozen.blocks(), []
    for changed in events:  # a set of rows changes, or a block is read
        if changed is None:
            found += [block.copy() for block in [next(blocks, None)] if block is not None]
        else:
            numbers = np.array([row for row in changed if row < num_rows], np.int32)[::-1].copy()
            frozen.keep(numbers)
            rows[torch.from_numpy(numbers)] += 100.0
    found += list(blocks)
    assert frozen.shape == (num_rows, 3)
    assert np.array_equal(np.concatenate([np.zeros((0, 3), np.float32), *found]), expected.numpy())


def test_who_keeps_too_much_waits_for_the_reader(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ALWAYS_KEPT", 0)
    rows = torch.zeros(16, 3)
    frozen = FrozenRows(rows)
    frozen.keep(np.arange(8, 12))
    waiting = threading.Thread(target=lambda: frozen.keep(np.arange(12, 16)))
    waiting.start()
    blocks = frozen.blocks()
    for _ in range(5):  # rows 0 to 9: two of those kept are read, and 6 are left where 4 may be
        next(blocks)
    waiting.join(0.05)
    assert waiting.is_alive()
    next(blocks)
    waiting.join(10)
    assert not waiting.is_alive()


def test_closing_frees_who_waits_and_keeps_nothing_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ALWAYS_KEPT", 0)
    frozen = FrozenRows(torch.zeros(16, 3))
    waiting = threading.Thread(target=lambda: frozen.keep(np.arange(16)))
    waiting.start()
    frozen.close()
    waiting.join(10)
    assert not waiting.is_alive()
    frozen.keep(np.arange(16))
    assert list(frozen.blocks()) == []
