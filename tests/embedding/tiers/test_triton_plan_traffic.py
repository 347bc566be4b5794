"""What a step of rows in place reads, writes and launches, counted in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="needs triton: pip install triton")

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from slipstream.embedding.tiers import triton_plan
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.triton_plan import TritonPlan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
DIM, LOOKUPS, NUM_HOT, NUM_ROWS = 128, 256, 20, 2000
VIEWS = {"view", "slice", "expand", "detach", "unsqueeze", "select", "alias", "empty", "new_empty", "as_strided"}
RADIX_PASSES = 4
"""Over the keys, eight bits each, and the order that goes along."""


class Meter(TorchDispatchMode):
    """Bytes by kernel and operation; a kernel's program that touches an address twice has it in its cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._seen: set[int] = set()
        for kind in ("load", "store"):
            original = getattr(InterpreterBuilder, f"create_masked_{kind}")
            monkeypatch.setattr(InterpreterBuilder, f"create_masked_{kind}", self._watch(kind, original))
        set_dim, set_place = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

        def begin_kernel(builder: Any, *dims: int) -> None:
            self.launches["triton"] += 1
            set_dim(builder, *dims)

        def begin_program(builder: Any, *place: int) -> None:
            self._seen.clear()
            set_place(builder, *place)

        call, self._is_interpreting = GridExecutor.__call__, False

        def run_kernel(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._is_interpreting = True  # it copies its arguments, which a device does not
            call(executor, *args, **kwargs)
            self._is_interpreting = False

        monkeypatch.setattr(GridExecutor, "__call__", run_kernel)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", begin_kernel)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", begin_program)

    def _watch(self, kind: str, original: Any) -> Any:
        at_mask = {"load": 1, "store": 2}[kind]

        def watched(builder: Any, pointers: Any, *given: Any) -> Any:
            addresses = np.asarray(pointers.data)[np.asarray(given[at_mask - 1].data, bool)]
            fresh = set(addresses.ravel().tolist()) - self._seen if kind == "load" else addresses.ravel().tolist()
            self._seen.update(fresh)
            self.bytes[f"triton {kind}"] += len(fresh) * (pointers.dtype.element_ty.primitive_bitwidth // 8)
            return original(builder, pointers, *given)

        return watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS and not self._is_interpreting:
            touched = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
            distinct = {(leaf.data_ptr(), leaf.nbytes): leaf.nbytes for leaf in touched}
            self.bytes[name] += sum(distinct.values()) * (2 * RADIX_PASSES if name == "sort" else 1)
            self.launches[name] += 1
        return made


def take_step(monkeypatch: pytest.MonkeyPatch, *, most_distinct: int) -> tuple[Meter, int, int]:
    """One step and what it reads ahead; (meter, distinct rows, cold ones among them), of both batches on average."""
    monkeypatch.setattr(triton_plan, "_MOVERS", 2)
    monkeypatch.setattr(triton_plan, "_UPDATERS", 4)
    rows = TieredRows(
        num_rows=NUM_ROWS,
        num_hot=NUM_HOT,
        embedding_dim=DIM,
        num_staged=2 * min(most_distinct, NUM_ROWS - NUM_HOT),
        optimizer="rowwise_adagrad",
        device=torch.device("cpu"),
    )
    options: dict[str, Any] = {"num_lookups": LOOKUPS, "most_distinct": most_distinct}
    now, following = (TritonPlan(rows, rows.on_host, half=half, **options) for half in (0, 1))
    rng = np.random.default_rng(5)
    slots = [np.minimum(NUM_ROWS ** rng.random(LOOKUPS), NUM_ROWS - 1).astype(np.int32) for _ in range(2)]
    now.load(torch.from_numpy(slots[0]))
    now.find(following)
    now.fetch()
    following.load(torch.from_numpy(slots[1]))
    gradients, lr = torch.ones(LOOKUPS, DIM), torch.tensor(0.1)
    with Meter(monkeypatch) as meter:
        following.find(now)
        following.fetch()
        now.look_up(LOOKUPS)
        now.update(rows.rule(), gradients, lr=lr)
        now.write_back()
        following.take_over(now)
    distinct = [np.unique(one) for one in slots]
    num_cold = sum(int((one >= NUM_HOT).sum()) for one in distinct)
    return meter, sum(map(len, distinct)) // 2, num_cold // 2


def test_a_step_moves_little_more_than_it_must_whatever_the_room_for_padding(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        meter, num_distinct, num_cold = take_step(patch, most_distinct=LOOKUPS)
    row_bytes = 4 * DIM
    # Rows are written for all lookups and their gradients read. Each distinct row is read to be looked up, and read
    # and written when it changes; each cold one is read on the host, written on the device, and written back.
    least = row_bytes * (2 * LOOKUPS + 3 * num_distinct + 3 * num_cold) + 4 * LOOKUPS
    assert sum(meter.bytes.values()) <= 1.3 * least, meter.bytes
    assert sum(meter.launches.values()) <= 60, meter.launches
    with monkeypatch.context() as patch:
        with_less_room, _, _ = take_step(patch, most_distinct=num_distinct + 30)
    assert with_less_room.bytes == meter.bytes
    assert with_less_room.launches == meter.launches
