"""Checkpoints of a training, written beside it.

A checkpoint holds everything a killed run needs to end with the parameters of an uninterrupted one: rows and optimizer
state by tier, dense layers, position in the epoch, samples waiting for a batch, what was kept of the current round,
staleness state. The order of samples and batches is redrawn from the seed.

    work/checkpoint-000000001200.safetensors   everything that is an array
    work/checkpoint-000000001200.records       cold rows of a mapped tier, where the file system shares blocks
    work/checkpoint-000000001200.json          written last: the rest, the hash of the other files, and its own
    work/checkpoint-….damaged                  one that could not be used, put aside

Rows are frozen, not copied, and a thread writes them block by block while training goes on. A mapped cold tier is
cloned instead where its file system can: the clone costs nothing until training changes blocks. The one before stays
until the next is whole. One whose hash is wrong is put aside, and the one before is taken, or training starts anew.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import xxhash

from slipstream.distributed.ranks import ALONE, Alone, Ranks
from slipstream.distributed.rows import ShardedTier
from slipstream.embedding.tiers.frozen import FrozenRows, FrozenTiers
from slipstream.errors import ArtifactError
from slipstream.io.artifacts import hash_file, sync, write_json
from slipstream.io.tensors import StoredTensor, write_tensors
from slipstream.training.loop import Trainer
from slipstream.training.order.rounds import OpenStreams
from slipstream.training.shared_step import require_same_model
from slipstream.training.stopping import StopSignals
from slipstream.training.training_state import collect_state, restore_state

_FORMAT = 3
_FORMAT_WITH_CLONE = 4
_HASHED_BYTES = 4 << 20
_CLONE = ".records"
_log = logging.getLogger(__name__)


class _AbandonedError(Exception):
    """Nobody needs what is being written."""


class Checkpointer:
    """Saves and restores a trainer.

    Left, it finishes what it is writing, unless all went well and nobody needs it any more.

    Args:
        folder: Where checkpoints lie.
        fingerprint: Of the run; a checkpoint of another run is put aside.
        every_steps: Steps between saves, rounded up to the end of a look-ahead chunk; 0 does not count steps.
        every_minutes: Minutes between saves; 0 does not look at the clock. Where both are 0, nothing is ever saved.
        clock: Seconds that pass.
        ranks: Who trains together: the first writes, and says when; all of them save, stop and restore as one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        every_steps: int,
        every_minutes: float,
        clock: Callable[[], float] = time.monotonic,
        ranks: Alone = ALONE,
    ) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._every_steps, self._every_seconds, self._clock = every_steps, 60 * every_minutes, clock
        self._ranks = ranks
        self._signals = StopSignals()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._is_abandoned = Event()
        self._saved_steps, self._saved_at = 0, clock()

    def __enter__(self) -> Checkpointer:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        """Finish what is being written, or give it up: when all went well, and when somebody insists on stopping."""
        if exc is None or self._signals.is_insistent:
            self._is_abandoned.set()
        self._writer.shutdown(wait=True)

    def train(self, trainer: Trainer, open_streams: OpenStreams) -> None:
        """Train to the end, and save after the last step. Ctrl-C and SIGTERM save before they interrupt.

        Args:
            trainer: Calls `between_chunks`; restored, where there was something to restore.
            open_streams: Gives the streams of an epoch.

        Raises:
            SlipstreamError: Whatever training expects to go wrong.
            KeyboardInterrupt: Somebody asked to stop; where training stands is saved.
        """
        with self._signals:
            trainer.train(open_streams)
        if self._is_on and trainer.totals.steps > self._saved_steps:
            self._is_abandoned.set()  # what is being written is not needed any more
            self.wait(trainer)
            self._is_abandoned.clear()
            self._save(trainer)

    def between_chunks(self, trainer: Trainer) -> None:
        """Save when it is time; called while no row moves.

        Raises:
            CapacityError: The disk was full for the last checkpoint.
            KeyboardInterrupt: Somebody asked to stop; where training stands is saved.
        """
        is_written = self._writing is not None and self._writing.done()
        is_free = self._writing is None or is_written
        stops, collects, saves = self._ranks.decide(
            self._signals.is_requested,
            is_written,
            is_free and self._is_due(trainer.totals.steps) and trainer.has_decided(),
        )
        if collects:
            self.wait(trainer)
        if stops:
            self._stop(trainer)
        if saves:
            self._save(trainer)

    def wait(self, trainer: Trainer) -> None:
        """Wait until nothing is being written.

        Raises:
            CapacityError: The disk was full.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            finally:
                trainer.lookahead.thaw()

    def restore(self, trainer: Trainer) -> bool:
        """Bring a trainer to the state of the newest checkpoint that is whole; returns whether there was one.

        Others are put aside, with a warning.
        """
        if isinstance(self._ranks, Ranks):
            return self._restore_together(trainer, self._ranks)
        found = self._find()
        if found is not None:
            self._take_over(trainer, *found)
        return found is not None

    def _restore_together(self, trainer: Trainer, ranks: Ranks) -> bool:
        """Let the first rank find the checkpoint that all of them read."""
        found = self._find() if ranks.leads else None
        said = None if found is None else {"state": found[0], "weights": str(found[1])}
        heard = ranks.share({"found": said}, "the checkpoint to go on from")["found"]
        if heard is None:
            return False
        if not Path(heard["weights"]).exists():
            raise ArtifactError(
                f"rank {ranks.rank} finds no `{heard['weights']}`, which rank 0 goes on from",
                hint="let all ranks see one run folder, on a file system that they share",
            )
        self._take_over(trainer, heard["state"], Path(heard["weights"]))
        return True

    def _find(self) -> tuple[dict[str, Any], Path] | None:
        """(state, weights) of the newest checkpoint that is whole."""
        for path in sorted(self._folder.glob("checkpoint-*.json"), reverse=True):
            weights = path.with_suffix(".safetensors")
            try:
                state = self._read(path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
                for file in (path, weights, path.with_suffix(_CLONE)):
                    if file.exists():
                        file.rename(file.with_name(f"{file.name}.damaged"))
                _log.warning(f"checkpoint `{weights}` cannot be used: {exc}; it is kept as `{weights.name}.damaged`")
                continue
            return state, weights
        if any(self._folder.glob("checkpoint-*.damaged")):
            _log.warning("training starts anew: no checkpoint is left")
        return None

    def _take_over(self, trainer: Trainer, state: Mapping[str, Any], weights: Path) -> None:
        restore_state(trainer, state, weights, clone=weights.with_suffix(_CLONE))
        self._saved_steps, self._saved_at = trainer.totals.steps, self._clock()
        if self._ranks.leads:
            _log.info(f"training goes on after step {trainer.totals.steps:,}, from `{weights}`")

    @property
    def _is_on(self) -> bool:
        return self._every_steps > 0 or self._every_seconds > 0

    def _is_due(self, steps: int) -> bool:
        by_steps = self._every_steps > 0 and steps - self._saved_steps >= self._every_steps
        by_clock = self._every_seconds > 0 and self._clock() - self._saved_at >= self._every_seconds
        return steps > self._saved_steps and (by_steps or by_clock)

    def _stop(self, trainer: Trainer) -> None:
        if self._is_on:
            _log.info("stopping; a checkpoint is written first, a second signal stops at once")
            self.wait(trainer)
            if trainer.totals.steps > self._saved_steps:
                self._save(trainer)
                self.wait(trainer)
        raise KeyboardInterrupt

    def _save(self, trainer: Trainer) -> None:
        """Freeze the rows, copy the rest, and begin to write."""
        require_same_model(trainer.step)
        state, tensors = collect_state(trainer)
        path = self._folder / f"checkpoint-{trainer.totals.steps:012d}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        frozen = trainer.lookahead.freeze(clone_to=path.with_name(f".{path.stem}{_CLONE}.tmp"))
        self._saved_steps, self._saved_at = trainer.totals.steps, self._clock()
        form = _FORMAT if frozen.clone is None else _FORMAT_WITH_CLONE
        body = {"format": form, "fingerprint": self._fingerprint, "state": state}
        self._writing = self._writer.submit(self._write, path, body, tensors, frozen)

    def _write(
        self, path: Path, body: dict[str, Any], tensors: Mapping[str, StoredTensor], frozen: FrozenTiers
    ) -> None:
        shards = None
        if isinstance(self._ranks, Ranks):
            shards = ShardedTier(self._ranks, frozen.cold, frozen.num_cold)
        if shards is not None and not self._ranks.leads:
            self._serve(frozen, shards)
            return
        stored = dict(tensors)
        # by their names the rows of the device come first: they change most, and what is read needs not be kept
        stored |= {f"device.{at}": self._store(one, one.shape, one.blocks) for at, one in enumerate(frozen.hot)}
        for name, one in zip(frozen.cold_names, frozen.cold, strict=True):
            stored[f"host.{name}"] = self._store(one, one.shape, one.blocks)
        if shards is not None:
            for index, one in enumerate(frozen.cold):
                shape = (frozen.num_cold, *one.shape[1:])
                stored[f"host.{index}"] = self._store(one, shape, partial(shards.read, index))
        try:
            self._remove_all_but_one()
            body["xxh3"] = write_tensors(path.with_suffix(".safetensors"), stored)
            if frozen.clone is not None:
                body["clone"] = self._publish_clone(frozen.clone, path.with_suffix(_CLONE))
            write_json(path, {"xxh3": _digest(body), "body": body})
            sync(path.parent)
        except _AbandonedError:
            return
        finally:
            if frozen.clone is not None:
                frozen.clone.unlink(missing_ok=True)
            frozen.close()
            if shards is not None:
                shards.dismiss()

    def _publish_clone(self, clone: Path, path: Path) -> str:
        """Hash a clone, and give it its name; returns the hash."""
        digest, start = xxhash.xxh3_64(), 0
        with clone.open("rb") as stream:
            while block := stream.read(_HASHED_BYTES):
                if self._is_abandoned.is_set():
                    raise _AbandonedError
                digest.update(block)
                # nobody reads it again, and training wants the memory
                os.posix_fadvise(stream.fileno(), start, len(block), os.POSIX_FADV_DONTNEED)
                start += len(block)
        sync(clone)
        clone.replace(path)
        return digest.hexdigest()

    def _serve(self, frozen: FrozenTiers, shards: ShardedTier) -> None:
        """Give the first rank what it asks for of the cold tier; hot rows it has itself."""
        for rows in frozen.hot:
            rows.close()
        try:
            shards.serve()
        finally:
            frozen.close()

    def _store(
        self, rows: FrozenRows, shape: tuple[int, ...], read: Callable[[], Iterator[np.ndarray]]
    ) -> StoredTensor:
        def blocks() -> Iterator[np.ndarray]:
            for block in read():
                if self._is_abandoned.is_set():
                    raise _AbandonedError
                yield block

        return StoredTensor(dtype=torch.empty(0, dtype=rows.dtype).numpy().dtype, shape=shape, blocks=blocks)

    def _remove_all_but_one(self) -> None:
        """Leave the newest checkpoint, and nothing of those before it or of one that was cut short."""
        whole = sorted(self._folder.glob("checkpoint-*.json"))
        for path in whole[:-1]:
            path.unlink()
        for suffix in (".safetensors", _CLONE):
            newest = {path.with_suffix(suffix) for path in whole[-1:]}
            for path in set(self._folder.glob(f"checkpoint-*{suffix}")) - newest:
                path.unlink()

    def _read(self, path: Path) -> dict[str, Any]:
        """Give the state in a checkpoint whose files are whole and belong to this run.

        Raises:
            ValueError, KeyError, TypeError, RecursionError, OSError: They are not.
        """
        stored = json.loads(path.read_text(encoding="utf-8"))
        body = stored["body"]
        if stored["xxh3"] != _digest(body):
            raise ValueError(f"the hash of `{path.name}` is wrong")
        if body["format"] not in (_FORMAT, _FORMAT_WITH_CLONE):
            raise ValueError(
                f"it has form {body['format']}, and this version of slipstream reads forms {_FORMAT} and "
                f"{_FORMAT_WITH_CLONE}"
            )
        if body["fingerprint"] != self._fingerprint:
            raise ValueError(f"it belongs to run {body['fingerprint']}, and this is {self._fingerprint}")
        if hash_file(path.with_suffix(".safetensors")) != body["xxh3"]:
            raise ValueError("its hash is wrong")
        if "clone" in body and hash_file(path.with_suffix(_CLONE)) != body["clone"]:
            raise ValueError(f"the hash of `{path.with_suffix(_CLONE).name}` is wrong")
        state: dict[str, Any] = body["state"]
        return state


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())
