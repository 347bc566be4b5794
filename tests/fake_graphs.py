"""Graphs of the pretended device: captured without effect, replayed by running their operations again.

Streams that fork within a graph are branches of their own at each replay, ordered by nothing but the events that were
captured.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from vector_clocks import join

if TYPE_CHECKING:
    from fake_cuda import FakeCuda, FakeEvent, FakeStream

BRANCH = " in graph "
"""In the names of streams that are branches of a graph."""


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def new_tensors(made: Any, given: Any) -> list[Tensor]:
    """What an operation made that shares no memory with what it was given."""
    known = {tensor.untyped_storage()._cdata for tensor in tensors_of(given)}
    return [tensor for tensor in tensors_of(made) if tensor.untyped_storage()._cdata not in known]


@dataclass(frozen=True)
class _Operation:
    """One node of a graph: an operation, or an event that is recorded or waited for."""

    stream: FakeStream
    """As it was while capturing."""
    event: FakeEvent | None = None
    waits: bool = False
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    made: Any = None


class FakeGraph:
    """Recorded operations."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.origin: FakeStream | None = None
        self.operations: list[_Operation] = []
        self._branches: dict[FakeStream, FakeStream] = {}

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        """Run everything again, results going where they went."""
        self._cuda.num_replays += 1
        launching = self._cuda.current_stream()
        for branch in self._branches.values():
            branch.clock = {branch.name: branch.clock[branch.name]}  # knows nothing but by the events to come
        with _disable_current_modes(), torch.no_grad():
            for node in self.operations:
                stream = launching if node.stream is self.origin else self._branch_of(node.stream)
                with self._cuda.stream(stream):
                    self._run(node, stream)
        for branch in self._branches.values():
            if launching.clock.get(branch.name, 0) < branch.clock[branch.name]:
                self._cuda.refused.append("a graph ends with work that its first stream does not wait for")

    def _branch_of(self, stream: FakeStream) -> FakeStream:
        if stream not in self._branches:
            self._branches[stream] = self._cuda.make_stream(f"{stream.name}{BRANCH}{id(self)}")
        return self._branches[stream]

    def _run(self, node: _Operation, stream: FakeStream) -> None:
        if node.event is not None:
            if node.waits:
                join(stream.clock, node.event.clock)
            else:
                stream.advance()
                node.event.clock = dict(stream.clock)
            return
        given = (node.args, node.kwargs)
        again = new_tensors(self._cuda.run_on_stream(node.func, *given), given)
        for old, new in zip(new_tensors(node.made, given), again, strict=True):
            old.copy_(new)


class FakeCapture:
    """What `torch.cuda.graph` gives."""

    def __init__(self, cuda: FakeCuda, graph: FakeGraph, *, pool: object, capture_error_mode: str) -> None:
        self._cuda, self._graph, self.mode = cuda, graph, capture_error_mode
        self.thread = threading.get_ident()
        self._events: set[FakeEvent] = set()
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> None:
        self._cuda.synchronize()
        self._cuda._capture = self
        self._cuda.capture_modes.append(self.mode)
        self._graph.origin = self._cuda.current_stream()
        self._cuda.on_capture()  # nothing is put back yet, so those it waits for need not wait for the lock
        self._cuda._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._cuda._capture = None
        with _disable_current_modes(), torch.no_grad():
            for now, before in self._before.values():
                now.copy_(before)
        self._cuda._lock.release()

    def note(self, stream: FakeStream, event: FakeEvent) -> None:
        """Record an event."""
        self._events.add(event)
        self._graph.operations.append(_Operation(stream, event))

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        """Let a stream wait for an event of this capture."""
        if event not in self._events:
            self._cuda.refused.append("a wait, while capturing, for an event from before")
        self._graph.operations.append(_Operation(stream, event, waits=True))

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation for the shape of its result; what it does to older memory is undone in the end."""
        for tensor in tensors_of((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made | self._before.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage._cdata] = whole, whole.clone()
        made = func(*args, **kwargs)
        self._cuda._adopt(made, (args, kwargs), born=None)
        self._made |= {tensor.untyped_storage()._cdata for tensor in new_tensors(made, (args, kwargs))}
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs, made))
        self._graph.operations.append(_Operation(self._cuda.current_stream(), None, False, func, *held))
        return made
