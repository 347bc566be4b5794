"""The processes that train together, and all that they say to each other.

`Ranks` is the world of one of R processes; `ALONE` is its twin for a single one, which exchanges nothing. A collective
names what it is for, so that a rank that waits in vain can say for what. Bytes are counted as this rank sends them,
padding included.

    lane        who uses it                                    where its tensors are
    compute     the training step                              device
    ahead       the look-ahead, in a thread of its own         host
    control     what is decided between chunks, tracker sums   host
    files       the thread that writes checkpoints             host
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from slipstream.errors import TrainingError

Lane = Literal["compute", "ahead", "control", "files"]

_POLL_SECONDS = 0.2
_BEAT_SECONDS = 2.0
_LAST_WORDS_SECONDS = 3.0
"""How long a rank that lost another one waits to hear why."""


class Alone:
    """The world of a process that trains by itself."""

    rank: int = 0
    size: int = 1
    """R."""

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and speaks to people."""
        return self.rank == 0

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        """Make of wishes what all ranks do: the first where any rank wants it, the others as the first rank says."""
        return wishes

    def own_part(self, num_samples: int) -> slice:
        """Give the samples of a batch that this rank computes; with fewer samples than ranks, some have none."""
        return part_of(num_samples, self.rank, self.size)

    def join(self, own: Tensor, num_samples: int) -> Tensor:
        """Give what all ranks computed of a batch, from what this one did. Shape (own, …) -> (num_samples, …)."""
        return own


def part_of(num_samples: int, rank: int, size: int) -> slice:
    """Give the samples of a batch that a rank computes: all parts make it up, in rank order."""
    return slice(num_samples * rank // size, num_samples * (rank + 1) // size)


ALONE: Final = Alone()


class Ranks(Alone):
    """The world of one of several processes.

    Args:
        rank: Of this process.
        size: R.
        store: Where ranks leave each other messages; it outlives those that fail.
        device: Where this rank computes.
        timeout_seconds: How long a rank waits for the others before it gives up.
    """

    def __init__(self, rank: int, size: int, *, store: Store, device: torch.device, timeout_seconds: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sent, by what for."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds that it spent in exchanges, waiting for others included; on a GPU, to begin them."""
        self._store, self._timeout = store, timeout_seconds
        self._num_messages = 0
        self._is_over = threading.Event()
        patience = timedelta(seconds=timeout_seconds)
        with self._explained("the other ranks to start"):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("slipstream", store),
                rank=rank,
                world_size=size,
                timeout=patience,
            )
            groups = {lane: dist.new_group(backend="gloo", timeout=patience) for lane in ("ahead", "control", "files")}
        self._groups: dict[str, Any] = {"compute": dist.group.WORLD, **groups}
        if self.leads:
            threading.Thread(target=self._beat, daemon=True, name="heart-beat").start()

    # --- collectives ---

    def sum(self, values: Tensor, what: str, *, lane: Lane = "compute") -> None:
        """Add the values of all ranks, in place; every rank has the same bits after."""
        with self._exchange(what):
            dist.all_reduce(values, group=self._groups[lane])
        self.sent[what] += 2 * (self.size - 1) * values.nbytes // self.size  # a ring: all but one part, twice

    def keep_largest(self, values: Tensor, what: str) -> None:
        """Take the largest of all ranks for each value, in place."""
        with self._exchange(what):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._groups["compute"])
        self.sent[what] += 2 * (self.size - 1) * values.nbytes // self.size

    def gather(self, values: Tensor, what: str, *, lane: Lane = "compute") -> Tensor:
        """Give the values of all ranks, which have one shape (…). Shape (R, …)."""
        together = values.new_empty(self.size, *values.shape)
        with self._exchange(what):
            dist.all_gather(list(together.unbind(0)), values.contiguous(), group=self._groups[lane])
        self.sent[what] += (self.size - 1) * values.nbytes
        return together

    def gather_uneven(self, values: Tensor, sizes: Sequence[int], what: str, *, lane: Lane = "compute") -> list[Tensor]:
        """Give the values of all ranks, in rank order.

        Args:
            values: Of this rank. Shape (sizes[rank], …).
            sizes: How many each rank has; known to all.
            what: What it is for.
            lane: Which lane.
        """
        most = max(sizes)
        if not most:
            return [values] * self.size
        if len(values) < most:  # backends want one shape
            padded = values.new_zeros(most, *values.shape[1:])
            padded[: len(values)] = values
            values = padded
        return [piece[:size] for piece, size in zip(self.gather(values, what, lane=lane), sizes, strict=True)]

    def send_to_first(self, values: Tensor, what: str, *, lane: Lane) -> list[Tensor]:
        """Bring values of one shape to the first rank, in rank order; the others get nothing."""
        pieces = [torch.empty_like(values) for _ in range(self.size)] if self.leads else None
        with self._exchange(what):
            dist.gather(values.contiguous(), pieces, dst=0, group=self._groups[lane])
        if pieces is None:
            self.sent[what] += values.nbytes
        return pieces or []

    def hear_from_first(self, value: int, what: str, *, lane: Lane) -> int:
        """Give the number that the first rank says."""
        said = torch.tensor([value])
        with self._exchange(what):
            dist.broadcast(said, src=0, group=self._groups[lane])
        return int(said)

    def decide(self, *wishes: bool) -> tuple[bool, ...]:
        """Make of wishes what all ranks do: the first where any rank wants it, the others as the first rank says."""
        wanted = self.gather(torch.tensor(wishes, dtype=torch.uint8), "decisions", lane="control").bool()
        return bool(wanted[:, 0].any()), *wanted[0, 1:].tolist()

    def join(self, own: Tensor, num_samples: int) -> Tensor:
        """Give what all ranks computed of a batch, from what this one did. Shape (own, …) -> (num_samples, …)."""
        parts = [part_of(num_samples, rank, self.size) for rank in range(self.size)]
        sizes = [part.stop - part.start for part in parts]
        return torch.cat(self.gather_uneven(own, sizes, "predictions"))

    def gather_arrays(self, arrays: Mapping[str, np.ndarray], what: str) -> list[dict[str, np.ndarray]]:
        """Give the arrays of all ranks, which have the same names and shapes, in rank order."""
        every: list[dict[str, np.ndarray]] = [{} for _ in range(self.size)]
        for name in sorted(arrays):
            together = self.gather(torch.from_numpy(arrays[name]), what, lane="control").numpy()
            for of_rank, values in zip(every, together, strict=True):
                of_rank[name] = values
        return every

    def require_equal(self, digest: int, what: str) -> None:
        """Make sure that something is the same on all ranks.

        Args:
            digest: Of it, below 2⁶³.
            what: What it is.

        Raises:
            TrainingError: It is not, on all ranks.
        """
        found = self.gather(torch.tensor([digest]), "checks", lane="control").flatten().tolist()
        self.refuse_difference(found, what)

    def refuse_difference(self, found: Sequence[object], what: str) -> None:
        """Refuse that ranks differ, given what each rank has; all ranks must be given the same.

        Raises:
            TrainingError: They do.
        """
        others = [rank for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise TrainingError(
                f"rank {', '.join(map(str, others))} of {self.size} has other {what} than rank 0",
                hint="start all ranks with the same pipeline, version and data; if they were, report it",
            )

    def count_anew(self) -> None:
        """Forget what was counted: another training begins."""
        self.sent.clear()
        self.seconds.clear()

    def figures(self, *, steps: int) -> dict[str, Any]:
        """Say how many trained together, and what they exchanged, as the manifest has it."""
        per_step = {what: round(count / max(steps, 1)) for what, count in sorted(self.sent.items())}
        seconds = {what: round(count, 3) for what, count in sorted(self.seconds.items())}
        return {"ranks": self.size, "sent_bytes_per_step": per_step, "exchange_seconds": seconds}

    # --- messages, by way of the store ---

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tell the others; the first rank alone does so."""
        with self._explained("a message"):
            self._store.set(f"message/{self._num_messages}", json.dumps(message))
        self._num_messages += 1

    def listen(self, what: str) -> dict[str, Any]:
        """Wait for what the first rank tells next, for as long as it is alive.

        Args:
            what: What it is about, should nothing come.

        Raises:
            TrainingError: A rank failed, or the first one was not heard of for too long.
        """
        key = f"message/{self._num_messages}"
        beat, heard = b"", time.monotonic()
        with self._explained(what):
            while not self._store.check([key]):
                self._raise_failure()
                latest = self._store.get("beat") if self._store.check(["beat"]) else b""
                if latest != beat:
                    beat, heard = latest, time.monotonic()
                if time.monotonic() - heard > self._timeout:
                    raise self._waited_in_vain(what)
                time.sleep(_POLL_SECONDS)
            self._num_messages += 1
            message: dict[str, Any] = json.loads(self._store.get(key))
        return message

    def share(self, message: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
        """Give what the first rank has to say, on every rank."""
        if not self.leads:
            return self.listen(what)
        assert message is not None
        self.tell(message)
        return dict(message)

    def fail(self, exc: BaseException) -> None:
        """Leave word of why this rank ends, and close its connections, so that the others end too."""
        words = "it was interrupted" if isinstance(exc, KeyboardInterrupt) else str(exc) or type(exc).__name__
        try:
            self._store.compare_set("failed", "", json.dumps({"rank": self.rank, "words": words}))
        except RuntimeError:
            pass  # whoever kept the messages is gone, and the connections are about to be
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._is_over.set()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _beat(self) -> None:
        number = 0
        while not self._is_over.is_set():
            try:
                self._store.set("beat", str(number))
            except RuntimeError:
                return
            number += 1
            self._is_over.wait(_BEAT_SECONDS)

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        with self._explained(what):
            yield
        self.seconds[what] += time.perf_counter() - began

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn what a backend says into who failed, and at what."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as exc:
            has_waited = time.monotonic() - began > 0.9 * self._timeout
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
            while time.monotonic() < deadline:
                self._raise_failure(exc)
                time.sleep(_POLL_SECONDS)
            if has_waited:
                raise self._waited_in_vain(what) from exc
            raise TrainingError(
                f"rank {self.rank} lost another rank while it waited for {what}: {str(exc).splitlines()[0]}",
                hint="the other one was killed, or its machine is gone; `torchrun --max-restarts` starts all ranks "
                "again, and training goes on from the last checkpoint",
            ) from exc

    def _raise_failure(self, cause: BaseException | None = None) -> None:
        try:
            failed = json.loads(self._store.get("failed")) if self._store.check(["failed"]) else None
        except RuntimeError:
            return
        if failed and failed["rank"] != self.rank:
            raise TrainingError(f"rank {failed['rank']} ended: {failed['words']}") from cause

    def _waited_in_vain(self, what: str) -> TrainingError:
        return TrainingError(
            f"rank {self.rank} waited {self._timeout:g} s for {what}, and another rank did not come",
            hint="see what the other ranks say; if one is only slow, raise `distributed.timeout_seconds`",
        )
