"""What each round trains on, decided while the round before it trains.

An epoch is cut into segments, one per staleness re-check, and segments into rounds of bounded size. A round takes its
fair share of the hot and of the cold samples, so every stretch of training sees both in the same proportion.

A round's samples are taken from their streams, the skipper says which of them stay, and those become batches. None of
this needs the model, except where the rule looks at it: `stale` after a check, and a rule that lets the model
score. Such a round is decided after the one before it; all else is done beside the one before it, by a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from slipstream.embedding.tiers.lookahead import Batch
from slipstream.embedding.tiers.sample_ring import SampleRing
from slipstream.io.samples import Samples
from slipstream.training.order.batches import BatchMaker
from slipstream.training.order.schedule import Schedule
from slipstream.training.order.stream import SampleStream
from slipstream.training.skipping.criterion import Scorer
from slipstream.training.skipping.skipper import Selection, Skipper

Picked = tuple[Selection, Selection]
"""What is kept of the hot and of the cold samples of a round."""
Taken = tuple[Samples | None, Samples | None]
"""The hot and the cold samples of a round."""
OpenStreams = Callable[[int], Mapping[str, SampleStream]]
"""The streams `hot` and `cold` of an epoch, from their beginning."""


@dataclass(frozen=True, slots=True)
class Round:
    """How many samples to take next, and whether a segment ends after them."""

    num_hot: int
    num_cold: int
    ends_segment: bool


def plan_rounds(
    num_hot: int, num_cold: int, *, batch_size: int, segment_steps: int, round_samples: int
) -> Iterator[Round]:
    """Cut an epoch into rounds.

    Args:
        num_hot: Hot samples of the epoch.
        num_cold: Cold samples of the epoch.
        batch_size: Samples per step.
        segment_steps: Steps per segment, dropped samples included.
        round_samples: Most samples a round may hold.
    """
    total = num_hot + num_cold
    per_segment = segment_steps * batch_size
    taken_hot = taken = 0
    while taken < total:
        segment_end = min((taken // per_segment + 1) * per_segment, total)
        stop = min(taken + round_samples, segment_end)
        hot_stop = round(num_hot * (stop / total))
        hot = hot_stop - taken_hot
        yield Round(hot, stop - taken - hot, stop == segment_end)
        taken_hot, taken = hot_stop, stop


@dataclass(kw_only=True, slots=True)
class Position:
    """Where training stands inside its schedule, and what is decided already."""

    epoch: int = 0
    round_index: int = 0
    batches_done: int = 0
    """Batches of the current round that are trained."""
    waiting: dict[str, Samples] = field(default_factory=dict)
    """Samples that waited for a batch when the round began."""
    picked: Picked | None = None
    """What the skipper kept of the round; None before the first."""
    picked_ahead: Picked | None = None
    """What it kept of the round after, where it was asked already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRound:
    """A round that can be trained."""

    epoch: int
    index: int
    """Within the epoch."""
    span: tuple[float, float]
    """Epochs done before and after it."""
    ends_segment: bool
    ends_epoch: bool
    waiting: dict[str, Samples]
    """Samples that waited for a batch before it."""
    picked: Picked
    batches: list[Batch]

    def num_dropped(self) -> int:
        """Count the samples left out."""
        return sum(int(np.count_nonzero(~selection.keep)) for selection in self.picked)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A round as planned, with the streams to take it from."""

    streams: Mapping[str, SampleStream]
    part: Round
    epoch: int
    index: int
    span: tuple[float, float]
    begins_segment: bool
    is_last: bool
    """Of its epoch."""


class RoundPreparer:
    """Prepares the rounds of a training, in order.

    Args:
        schedule: How epochs are cut.
        skipper: Leaves samples out.
        score: The model's predictions, for a rule that asks for them.
        position: Where to begin; what it has picked is not decided again.
        ring: Where the device keeps samples, to which windows are brought a round ahead; None for nowhere.
    """

    def __init__(
        self,
        schedule: Schedule,
        skipper: Skipper,
        *,
        score: Scorer,
        position: Position,
        ring: SampleRing | None = None,
    ) -> None:
        self._schedule, self._skipper, self._score, self._ring = schedule, skipper, score, ring
        self._start = position.epoch, position.round_index
        self._known = [picked for picked in (position.picked, position.picked_ahead) if picked is not None]
        self._maker = BatchMaker(
            batch_size=schedule.batch_size,
            order=schedule.order,
            smaller_by=schedule.smaller_by,
            positive_weight=schedule.positive_weight,
        )
        self._maker.waiting = dict(position.waiting)
        self._ahead: Future[PreparedRound] | None = None

    def run(self, open_streams: OpenStreams) -> Generator[PreparedRound, None, None]:
        """Give the rounds from the position on. The reader must train each before it asks for the next."""
        tasks = self._plan(open_streams)
        task = next(tasks, None)
        if task is None:
            return
        # one worker: what it is given later may count on what it was given before
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rounds") as thread:
            taken = self._begin_to_take(thread, task)
            while task is not None:
                prepared = self._prepare(task, taken) if self._ahead is None else self._ahead.result()
                task = next(tasks, None)
                self._ahead = None
                if task is not None:
                    taken = self._begin_to_take(thread, task)
                    if self._skipper.decides_ahead(begins_segment=task.begins_segment):
                        self._ahead = thread.submit(self._prepare, task, taken)
                yield prepared

    def _begin_to_take(self, thread: ThreadPoolExecutor, task: _Task) -> Future[Taken]:
        """Take the samples of a round by the thread, while the one before it trains; the one before that is over."""
        if self._ring is not None:
            self._ring.mark_computed()
        return thread.submit(self._take, task)

    def _take(self, task: _Task) -> Taken:
        hot, cold = task.streams["hot"].take(task.part.num_hot), task.streams["cold"].take(task.part.num_cold)
        if self._ring is not None:
            self._ring.bring([group.picks() for group in (hot, cold) if group is not None])
        return hot, cold

    def wait(self) -> Picked | None:
        """Wait until no round is being prepared; returns what was picked of the next one, if it is."""
        return None if self._ahead is None else self._ahead.result().picked

    def is_idle(self) -> bool:
        """Whether `wait` would return at once."""
        return self._ahead is None or self._ahead.done()

    def _plan(self, open_streams: OpenStreams) -> Iterator[_Task]:
        schedule = self._schedule
        for epoch in range(self._start[0], schedule.epochs):
            streams = open_streams(epoch)
            for stream in streams.values():
                stream.gives_picks = self._ring is not None
            num_hot, num_cold = streams["hot"].remaining, streams["cold"].remaining
            parts = plan_rounds(
                num_hot,
                num_cold,
                batch_size=schedule.batch_size,
                segment_steps=schedule.segment_steps,
                round_samples=schedule.round_samples,
            )
            taken, total, begins_segment = 0, num_hot + num_cold, True
            passed = [0, 0]  # hot and cold samples trained before the run was interrupted
            is_open = False
            for index, part in enumerate(parts):
                before, taken = taken, taken + part.num_hot + part.num_cold
                task = _Task(
                    streams=streams,
                    part=part,
                    epoch=epoch,
                    index=index,
                    span=(epoch + before / total, epoch + taken / total),
                    begins_segment=begins_segment,
                    is_last=taken == total,
                )
                begins_segment = part.ends_segment
                if (epoch, index) < self._start:
                    passed[0], passed[1] = passed[0] + part.num_hot, passed[1] + part.num_cold
                    continue
                if not is_open:
                    streams["hot"].skip(passed[0])
                    streams["cold"].skip(passed[1])
                    is_open = True
                yield task

    def _prepare(self, task: _Task, taken: Future[Taken]) -> PreparedRound:
        hot, cold = taken.result()
        key = [self._schedule.seed, task.epoch, task.index]
        waiting = dict(self._maker.waiting)
        picked = self._known.pop(0) if self._known else self._pick(task, hot, cold, np.random.default_rng([*key, 0]))
        kept = (
            None if group is None else selection.apply(group)
            for group, selection in zip((hot, cold), picked, strict=True)
        )
        rng, thinned = np.random.default_rng([*key, 1]), self._thinned(picked)
        batches = list(self._maker.make(*kept, rng=rng, last=task.is_last, thinned=thinned))
        return PreparedRound(
            epoch=task.epoch,
            index=task.index,
            span=task.span,
            ends_segment=task.part.ends_segment,
            ends_epoch=task.is_last,
            waiting=waiting,
            picked=picked,
            batches=batches,
        )

    def _thinned(self, picked: Picked) -> tuple[float, float]:
        """Say of which share of the hot and of the cold samples some are dropped, of their kind or of all."""
        drops = [not selection.keep.all() for selection in picked]
        if self._schedule.order == "mixed":
            total = sum(len(selection.keep) for selection in picked)
            shares = [is_thinned * len(one.keep) / total for is_thinned, one in zip(drops, picked, strict=True)]
            return shares[0], shares[1]
        return float(drops[0]), float(drops[1])

    def _pick(self, task: _Task, hot: Samples | None, cold: Samples | None, rng: np.random.Generator) -> Picked:
        is_first = (task.epoch, task.index) == (0, 0)
        if task.begins_segment and not is_first and not self._skipper.criterion.watches_rows:
            self._skipper.start()
        return self._skipper.select(hot, cold, rng=rng, score=self._score)
