"""A CUDA device that is none: memory and arithmetic of the CPU, streams as vector clocks, graphs that replay.

Code that asks for `cuda` runs unchanged and computes what it would on a CPU, so results can be compared to the bit.
What a CPU hides is watched. A stream learns what its thread knows when it is given work, a thread learns from an event
when it waits for it, and tasks and results of a thread pool carry what their givers know. Every access to device memory
or to page-locked memory must be ordered with those before it, row by row where rows are picked; else it is a race,
whatever the timing of today.

    races              accesses without an order
    not_handed_over()  memory that died without the allocator being told of a stream that used it
    beside_captures    calls of other threads while a graph was captured
    refused            calls that the capture does not allow: those of others in mode "global", and its own that wait
    pinned_bytes       of every allocation of page-locked memory
    pageable_copies    copies between the device and ordinary memory; the host waits for these
    spins              waits for events that do not let the thread sleep
    launches           operations given to the device one by one, not by a graph

A graph is captured without effect and replayed by running its operations again: `fake_graphs`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from fake_graphs import BRANCH, FakeCapture, FakeGraph, new_tensors, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vector_clocks import Clock, Memory, join

from slipstream.embedding.tiers import frozen
from slipstream.training import assemble

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SYNCHRONISING = frozenset(
    "_local_scalar_dense nonzero _unique2 unique_dim unique_consecutive masked_select equal bincount".split()
)
"""Operations whose result, or its shape, the host waits for."""
_OVERWRITING = {"copy_", "fill_", "zero_", "index_copy_", "index_fill_"}
_BY_ROWS = {"index_select", "index_copy_", "index_add_", "index_fill_", "index", "index_put_", "_index_put_impl_"}


class FakeCuda:
    """The device."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.beside_captures: list[str] = []
        self.refused: list[str] = []
        self.pinned_bytes: list[int] = []
        self.pageable_copies: list[str] = []
        self.spins: list[str] = []
        self.launches: list[str] = []
        self.capture_modes: list[str] = []
        self.num_replays = 0
        self.on_capture: Callable[[], None] = lambda: None
        """Called when a capture has begun."""
        self.limit_bytes: float = float("inf")
        self.locked: dict[int, int] = {}
        """Bytes of host memory that is page-locked where it lies, by address."""
        self.lock_error = 0
        """What `cudaHostRegister` answers."""
        self._memories: dict[int, Memory] = {}
        self._allocated_bytes = 0
        self._streams: list[FakeStream] = []
        self._of_thread = threading.local()
        self._thread_numbers = count()
        self._lock = threading.RLock()
        self._capture: FakeCapture | None = None
        self._compute = FakeStream(self, "compute")

    @property
    def has_been_used(self) -> bool:
        """Whether anything was ever put there."""
        return any(not memory.is_pinned for memory in self._memories.values())

    def not_handed_over(self) -> list[str]:
        """Memory that is gone, and the streams that may still have used it.

        What several streams write is taken to live to the end, as its owner does. Whoever launches a graph waits for
        all of its branches.
        """
        return [
            f"{memory.num_units} x {memory.unit} bytes of {memory.born} used by {sorted(others)}"
            for memory in self._memories.values()
            if memory.born and memory.storage.expired() and len(memory.writes) == 1
            if (others := {name for name in memory.used_by if BRANCH not in name} - memory.handed_to - {memory.born})
        ]

    # --- who is at work ---

    def thread(self) -> tuple[str, Clock]:
        """Name and clock of the current thread."""
        mine = self._of_thread
        if not hasattr(mine, "clock"):
            mine.name = f"{threading.current_thread().name} ({next(self._thread_numbers)})"
            mine.clock = {mine.name: 0}
        return mine.name, mine.clock

    def current_stream(self, device: object = None) -> FakeStream:
        """The stream that the current thread gives work to."""
        return getattr(self._of_thread, "stream", self._compute)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Give work to another stream."""
        before = self.current_stream()
        self._of_thread.stream = stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def synchronize(self, device: object = None) -> None:
        """Wait for everything."""
        self.call("cudaDeviceSynchronize", waits=True)
        for stream in self._streams:
            join(self.thread()[1], stream.clock)

    def make_stream(self, name: str) -> FakeStream:
        """Give a stream that does not look for work of its own."""
        return FakeStream(self, name)

    def own_capture(self) -> FakeCapture | None:
        """The capture that the current thread makes, if it makes one."""
        capture = self._capture
        return capture if capture is not None and capture.thread == threading.get_ident() else None

    def call(self, what: str, *, waits: bool = False) -> None:
        """Note a call, where a graph is being captured; what waits is refused to the capturing thread itself."""
        capture = self._capture
        if capture is None:
            return
        if capture.thread != threading.get_ident():
            self.beside_captures.append(f"{what} by {self.thread()[0]}")
            if capture.mode == "global":
                self.refused.append(self.beside_captures[-1])
        elif waits:
            self.refused.append(f"{what} by the capturing thread")

    # --- memory ---

    def memory_of(self, value: object) -> Memory | None:
        """What is known of a tensor's storage; None for ordinary memory."""
        return self._memories.get(value.untyped_storage()._cdata) if isinstance(value, Tensor) else None

    def is_on_device(self, value: object) -> bool:
        """Whether a tensor lives on the device."""
        memory = self.memory_of(value)
        return memory is not None and not memory.is_pinned

    def _adopt(self, made: Any, given: Any, *, born: str | None) -> None:
        """Watch what an operation allocated on the device."""
        known = {tensor.untyped_storage()._cdata for tensor in tensors_of(given)}
        for tensor in tensors_of(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._memories[storage._cdata] = Memory.of(tensor, is_pinned=False, born=born)
                self._allocated_bytes += storage.nbytes()
                if self._allocated_bytes > self.limit_bytes:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes")

    def _access(self, actor: str, clock: Clock, tensor: Tensor, what: str, *, rows: Any = None, writes: bool) -> None:
        memory = self.memory_of(tensor)
        if memory is None or not tensor.numel():
            return
        others = memory.access(actor, clock, memory.units_of(tensor, rows), writes=writes)
        if others:
            kind = f"{'page-locked' if memory.is_pinned else 'device'} memory {tuple(tensor.shape)}"
            self.races.append(f"{actor} {'writes' if writes else 'reads'} {kind} in {what}, in no order with {others}")

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        """Lock pages."""
        if not self.lock_error:
            self.locked[address] = num_bytes
        return self.lock_error

    def cudaHostUnregister(self, address: int) -> int:
        """Let go of pages."""
        del self.locked[address]
        return 0

    def view_of(self, region: Any) -> Tensor:
        """Locked memory as the device sees it: the same memory, and watched from now on."""
        host: Tensor = region.host
        assert self.locked[host.data_ptr()] >= host.nbytes
        memory = Memory.of(host, is_pinned=True, born=None)
        self._memories.setdefault(host.untyped_storage()._cdata, memory)
        view = host.view(host.shape)
        view.region = region  # type: ignore[attr-defined]
        return view

    # --- operations ---

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation, on the device where it touches it."""
        name = func.overloadpacket.__name__
        wants_device = torch.device(kwargs.get("device") or CPU).type == "cuda"
        wants_pinned = bool(kwargs.get("pin_memory")) or name == "_pin_memory"
        known = [memory for tensor in tensors_of((args, kwargs)) if (memory := self.memory_of(tensor)) is not None]
        is_for_device = wants_device or any(not memory.is_pinned for memory in known)
        if name == "is_pinned":
            return bool(known) and not is_for_device
        if not (wants_pinned or is_for_device or known):
            return func(*args, **kwargs)
        if wants_pinned or is_for_device:
            waits = wants_pinned or name in SYNCHRONISING or self._is_pageable_copy(name, args)
            self.call("cudaHostAlloc" if wants_pinned else name, waits=waits)
        if wants_device:
            kwargs = {**kwargs, "device": CPU}
        with self._lock:  # a capture holds it, so that others cannot change what it puts back
            if wants_pinned:
                return self._allocate_pinned(func, args, kwargs)
            if not is_for_device:
                actor, clock = self.thread()
                clock[actor] += 1
                self._watch(func, args, kwargs, actor, clock)
                return func(*args, **kwargs)
            if (capture := self.own_capture()) is not None:
                return capture.record(func, args, kwargs)
            if not func.is_view:
                self.launches.append(name)
            return self.run_on_stream(func, args, kwargs)

    def run_on_stream(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give an operation to the current stream."""
        stream, (thread, known) = self.current_stream(), self.thread()
        name = func.overloadpacket.__name__
        stream.advance()
        self._watch(func, args, kwargs, stream.name, stream.clock)
        made = func(*args, **kwargs)
        self._adopt(made, (args, kwargs), born=stream.name)
        for tensor in new_tensors(made, (args, kwargs)):
            self._access(stream.name, stream.clock, tensor, name, writes=True)
        is_pageable = self._is_pageable_copy(name, args)
        if is_pageable:
            self.pageable_copies.append(f"{tuple(args[0].shape)} by {thread}")
        if is_pageable or name in SYNCHRONISING:
            join(known, stream.clock)
        return made

    def to_host(self, tensor: Tensor) -> Tensor:
        """What `.cpu()` gives: the host waits for it."""
        self.call("cudaMemcpy to ordinary memory", waits=True)
        with self._lock, _disable_current_modes():
            stream = self.current_stream()
            stream.advance()
            self._access(stream.name, stream.clock, tensor, "cpu", writes=False)
            join(self.thread()[1], stream.clock)
            self.pageable_copies.append(f"{tuple(tensor.shape)} by {self.thread()[0]}")
            return tensor.detach().clone()

    def _allocate_pinned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "device")}
        pinned: Tensor = args[0].clone() if func.overloadpacket.__name__ == "_pin_memory" else func(*args, **kwargs)
        self.pinned_bytes.append(pinned.nbytes)
        self._memories[pinned.untyped_storage()._cdata] = Memory.of(pinned, is_pinned=True, born=None)
        return pinned

    def _is_pageable_copy(self, name: str, args: tuple[Any, ...]) -> bool:
        sides = {"_to_copy": args[:1], "copy_": args[:2]}.get(name, ())
        return any(isinstance(side, Tensor) and self.memory_of(side) is None for side in sides)

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], actor: str, clock: Clock) -> None:
        """Check what an operation reads and writes of its arguments."""
        if func.is_view:
            return
        name, schema = func.overloadpacket.__name__, func._schema.arguments
        values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
        for argument in schema:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            rows = _picked_rows(values) if argument.name == "self" and name in _BY_ROWS else None
            for tensor in tensors_of(values.get(argument.name)):
                if not writes or (name not in _OVERWRITING and argument.name != "out"):
                    self._access(actor, clock, tensor, name, rows=rows, writes=False)
                if writes:
                    self._access(actor, clock, tensor, name, rows=rows, writes=True)


def _picked_rows(values: dict[str, Any]) -> Tensor | None:
    """The rows that an operation picks by index; None for all."""
    if values.get("dim") == 0:
        return values["index"]
    indices = values.get("indices") or ()
    return indices[0] if len(indices) == 1 else None


class FakeStream:
    """A queue of work."""

    def __init__(self, cuda: FakeCuda, name: str | None = None) -> None:
        self._cuda, self.name = cuda, name or f"stream {len(cuda._streams)}"
        self.clock: Clock = {self.name: 0}
        cuda._streams.append(self)

    def advance(self) -> None:
        """Take on one more piece of work, from the current thread."""
        join(self.clock, self._cuda.thread()[1])
        self.clock[self.name] += 1

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._cuda)
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        if (capture := self._cuda.own_capture()) is not None:
            capture.wait(self, event)
            return
        join(self.clock, event.clock)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


class FakeEvent:
    """A point in the work of a stream."""

    def __init__(self, cuda: FakeCuda, *, blocking: bool = False) -> None:
        self._cuda, self._blocking, self.clock = cuda, blocking, Clock()

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self._cuda.current_stream()
        if (capture := self._cuda.own_capture()) is not None:
            capture.note(stream, self)
            return
        stream.advance()
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        thread, clock = self._cuda.thread()
        self._cuda.call("cudaEventSynchronize", waits=True)
        if not self._blocking:
            self._cuda.spins.append(thread)
        join(clock, self.clock)


class _WatchedCondition(threading.Condition):
    """A lock that hands on what those who held it knew."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda, self._known = cuda, Clock()

    def __enter__(self) -> bool:
        entered = super().__enter__()
        join(self._cuda.thread()[1], self._known)
        return entered

    def __exit__(self, *exc: Any) -> None:
        join(self._known, self._cuda.thread()[1])
        super().__exit__(*exc)

    def wait(self, timeout: float | None = None) -> bool:
        join(self._known, self._cuda.thread()[1])
        notified = super().wait(timeout)
        join(self._cuda.thread()[1], self._known)
        return notified


class _Watch(TorchDispatchMode):
    """Shows the device every operation of a thread."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.run(func, args, kwargs or {})


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let there be a device `cuda`."""
    cuda = FakeCuda()

    def capture(graph: FakeGraph, pool: object = None, capture_error_mode: str = "global") -> FakeCapture:
        return FakeCapture(cuda, graph, pool=pool, capture_error_mode=capture_error_mode)

    for name, replacement in {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "Stream": lambda device=None: FakeStream(cuda),
        "Event": lambda **options: FakeEvent(cuda, **options),
        "current_stream": cuda.current_stream,
        "stream": cuda.stream,
        "synchronize": cuda.synchronize,
        "CUDAGraph": lambda: FakeGraph(cuda),
        "graph": capture,
        "cudart": lambda: cuda,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    # Triton would read and write memory behind its back; the same work in plain PyTorch is watched
    monkeypatch.setattr(assemble, "has_triton", lambda: False)
    monkeypatch.setattr(frozen, "Condition", lambda: _WatchedCondition(cuda))
    _patch_tensors(cuda, monkeypatch)
    _patch_pools(cuda, monkeypatch)
    with _Watch(cuda):
        yield cuda


def _patch_tensors(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say where they live, and move."""
    base, make_tensor, as_tensor = torch._C.TensorBase, torch.tensor, torch.as_tensor

    def tensor(values: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
        made: Tensor = make_tensor(values, **options)
        return made if device is None else made.to(device)

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        is_there = cuda.is_on_device(tensor)
        if device is not None and device.type == "cuda" and not is_there:
            return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
        if device is None or not is_there:
            return base.to(tensor, *args, **kwargs)
        moved = tensor if device.type == "cuda" else cuda.to_host(tensor)
        return moved if dtype is None else base.to(moved, dtype)

    def numpy(tensor: Tensor, **options: Any) -> np.ndarray:
        if cuda.is_on_device(tensor):
            raise TypeError("can't convert cuda device type tensor to numpy")
        return base.numpy(tensor, **options)

    def record_stream(tensor: Tensor, stream: FakeStream) -> None:
        memory = cuda.memory_of(tensor)
        assert memory is not None
        memory.handed_to.add(stream.name)

    def as_tensor_there(data: Any, **options: Any) -> Tensor:
        return cuda.view_of(data) if hasattr(data, "__cuda_array_interface__") else as_tensor(data, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "as_tensor", as_tensor_there)
    for name, replacement in {
        "to": to,
        "cpu": lambda tensor: to(tensor, CPU),
        "cuda": lambda tensor, device=None: to(tensor, CUDA),
        "numpy": numpy,
        "record_stream": record_stream,
        "device": property(lambda tensor: CUDA if cuda.is_on_device(tensor) else base.device.__get__(tensor)),
        "is_cuda": property(cuda.is_on_device),
    }.items():
        monkeypatch.setattr(torch.Tensor, name, replacement, raising=False)


def _patch_pools(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks know what their giver knew, and who takes a result knows what the task knew."""
    submit, result = ThreadPoolExecutor.submit, Future.result

    def watched_submit(pool: ThreadPoolExecutor, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        given, learned = dict(cuda.thread()[1]), Clock()

        def watched() -> Any:
            join(cuda.thread()[1], given)
            try:
                with _Watch(cuda):
                    return work(*args, **kwargs)
            finally:
                join(learned, cuda.thread()[1])

        future = submit(pool, watched)
        future.learned = learned  # type: ignore[attr-defined]
        return future

    def watched_result(future: Future[Any], timeout: float | None = None) -> Any:
        try:
            return result(future, timeout)
        finally:
            join(cuda.thread()[1], getattr(future, "learned", {}))

    monkeypatch.setattr(ThreadPoolExecutor, "submit", watched_submit)
    monkeypatch.setattr(Future, "result", watched_result)
