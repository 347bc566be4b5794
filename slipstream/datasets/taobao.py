"""Taobao UserBehavior logs, as sequences in the manner of TBSM.

A line is an event: user, item, category, behaviour (pv, cart, fav or buy), Unix time; commas between, no header. Lines
may stand in any order; samples do not depend on it. A sample is what a user did last, and a candidate item: label 1
when the user took the candidate next, 0 when it was drawn at random. Every behaviour counts as an event.

To be scored, every line is a candidate after the events before it; one with an empty behaviour is not an event too.

    cat_0 user; cat_1, cat_2 item and category of the oldest event, …, cat_41, cat_42 those of the candidate
    int_0 … int_20 seconds from each event to the candidate, 0 for the candidate
    day    hour (Unix time / 3600) of the user's last event, so that split `by_time` holds whole users out

There are three tables, user, item and category; all time steps look up the same. A history shorter than
`history_length` is padded in front with MISSING_ID.

Positives are up to `points_per_user` events of a user, drawn among all but the first. The negative beside each has
the same history and, as candidate, an event of another user: one of about a thousand who are neighbours when users are
sorted as text, as the published file has them, and of these one whose last event was at nearly the same time. So an
item is a negative as often as it is a positive, no list of all items is needed, and users held out by time draw from
each other: with negatives from training users, a model could tell them by having seen them. Draws hash the seed, the
user and a number, not a place in the file; events of a user in the same second are taken by item, then category.

Source: TBSM (facebookresearch/tbsm) and its taobao_prepare.py, which draw at most 10 positives and 10 negatives a user
from the last 200 events, give every step its position as dense value, and keep the whole log in memory.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import polars as pl

from slipstream.datasets.source import OWNER, GroupingSource, ParsedBlock, SourceOptions
from slipstream.ops.delimited import read_fields
from slipstream.ops.split import mix64
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

BEHAVIOURS = ("pv", "cart", "fav", "buy")
"""What a user may do: look, put in the cart, mark, buy."""
FIELDS = ("user", "item", "category", "behaviour", "time")
"""Fields of a line, in order."""
USER, ITEM, CATEGORY = 0, 1, 2
"""Tables."""

_USERS_PER_GROUP = 1024
_NEIGHBOURHOODS = 16  # negatives come from an eighth of a group: a sixteenth to each side
_LEAST_REACH = 64
_MOST_DIGITS = 18
_POWERS = 10 ** np.arange(_MOST_DIGITS, dtype=np.int64)
_NUMBER = re.compile(rb"[0-9]{1,18}")
_POSITION_STREAM, _NEGATIVE_STREAM = 1, 2


class TaobaoSource(GroupingSource):
    """Events of users to samples of sequences.

    Args:
        seed: Draws positives and negatives.
        history_length: Past events in a sample.
        points_per_user: Positives of one user at most.
        max_ind_range: Ids are taken modulo this number; 0 keeps them.
    """

    num_tables = 3
    fields = FIELDS
    separator = ","
    nothing_before = "no event of this user before it"
    padded_tables = (ITEM, CATEGORY)

    def __init__(self, *, seed: int, history_length: int, points_per_user: int, max_ind_range: int = 0) -> None:
        self._seed, self._points_per_user = seed, points_per_user
        self._num_steps = history_length + 1
        self._max_ind_range = max_ind_range

    @property
    def num_dense(self) -> int:
        """One dense value per step."""
        return self._num_steps

    @property
    def table_of_column(self) -> tuple[int, ...]:
        """The user, then item and category step by step."""
        return (USER, *(ITEM, CATEGORY) * self._num_steps)

    @property
    def column_names(self) -> dict[str, str]:
        """Names such as `item-3`, the third last event; the candidate has no number."""
        names = {table_name(0): "user"}
        for step in range(self._num_steps):
            ago = "" if step == self._num_steps - 1 else f"-{self._num_steps - 1 - step}"
            names |= {
                dense_name(step): f"seconds{ago}",
                table_name(1 + 2 * step): f"item{ago}",
                table_name(2 + 2 * step): f"category{ago}",
            }
        return names

    def parse(self, data: bytes) -> ParsedBlock:
        """Turn all events of a log into samples, and into rejects what is no event."""
        parsed = self.parse_events(data)
        return dataclasses.replace(parsed, samples=self.make_samples(parsed.samples))

    def parse_events(self, data: bytes) -> ParsedBlock:
        """Turn lines into events and rejects."""
        events, rejected, num_lines = read_events(data)
        owners = pl.Series(OWNER, _order_as_text(events["user"].to_numpy()))
        events = events.select(owners, "item", "category", "time").sort(OWNER)
        return ParsedBlock(samples=events, rejected_lines=rejected, num_lines=num_lines)

    def parse_lines(self, data: bytes) -> ParsedBlock:
        """Turn lines into events and rejects; a line without behaviour is a candidate."""
        events, rejected, num_lines = read_events(data, with_candidates=True)
        lines = events.select(
            pl.Series(OWNER, _order_as_text(events["user"].to_numpy())),
            "item",
            "category",
            "time",
            pl.col("behaviour").is_null().alias("is_candidate"),
            pl.Series("line", np.delete(np.arange(num_lines), rejected)),
        )
        return ParsedBlock(samples=lines.sort(OWNER), rejected_lines=rejected, num_lines=num_lines)

    def begins_group(self, owners: np.ndarray) -> np.ndarray:
        """Whether a user's hash is a multiple of a thousand or so."""
        return np.asarray(mix64(_user_of(owners)) % np.uint64(_USERS_PER_GROUP) == 0)

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no event."""
        return _explain(line) or "not an event line"

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids in decimal; MISSING_ID, the padding, as the empty string."""
        missing = pl.Series(raw_ids == MISSING_ID)
        text = pl.Series(raw_ids).cast(pl.String)
        return pl.select(pl.when(missing).then(pl.lit("")).otherwise(text)).to_series()

    def make_samples(self, events: pl.DataFrame) -> pl.DataFrame:
        """Give the samples of whole groups of users.

        Args:
            events: `OWNER`, item, category, time of each event.
        """
        log = _Log(events.sort(OWNER, "time", "item", "category"))
        positives = self._pick_positives(log)
        negatives = self._pick_negatives(log, positives)
        runs = log.run_of_event[positives]
        # row by row the places of a sample's events: the history, oldest first, then the positive itself; a place in
        # front of the user's first event belongs to somebody else and is padding
        places = positives[:, None] + np.arange(1 - self._num_steps, 1)
        is_padding = places < log.bounds[runs][:, None]
        places = np.where(is_padding, positives[:, None], places)
        seconds = np.where(is_padding, 0, log.times[positives][:, None] - log.times[places])
        # Samples are positive, negative, positive, negative, …, no negative where there is nobody to draw from.
        # `point` numbers the positives, each twice if a negative follows: the second of two equal numbers is that one.
        point = np.repeat(np.arange(len(positives)), 1 + (negatives >= 0))
        label = np.ones(len(point), np.uint8)
        label[1:][point[1:] == point[:-1]] = 0
        candidate = np.where(label == 1, positives[point], negatives[point])

        at = np.column_stack([places[point, :-1], candidate])
        columns = self._columns(
            log.users[runs][point], seconds[point], at, is_padding[point], log.items, log.categories
        )
        return pl.DataFrame({LABEL: label, **columns, "day": (log.last_times[runs] // 3600)[point]})

    def make_line_samples(self, lines: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
        """Give the sample that each line makes with the events of its user before it.

        A candidate has the events of the same second before it, and stands before no event.

        Args:
            lines: `OWNER`, item, category, time, is_candidate, line of each.
        """
        lines = lines.sort(OWNER, "time", "is_candidate", "item", "category", "line")
        owners, times, line = (lines[name].to_numpy() for name in (OWNER, "time", "line"))
        is_event = ~lines["is_candidate"].to_numpy()
        event_at = np.flatnonzero(is_event)  # events by number, in order of users and time
        # how many events stand before each line, so the number of the next; and of its user's first
        num_before = np.cumsum(is_event) - is_event
        first = np.searchsorted(owners[event_at], owners)
        at = np.flatnonzero(num_before > first)
        numbers = num_before[at][:, None] + np.arange(1 - self._num_steps, 0)
        is_padding = numbers < first[at][:, None]
        history = event_at[np.where(is_padding, first[at][:, None], numbers)]
        seconds = np.where(is_padding, 0, times[at][:, None] - times[history])
        no_padding = np.zeros((len(at), 1), bool)
        columns = self._columns(
            _user_of(owners[at]).astype(np.int64),
            np.column_stack([seconds, np.zeros(len(at), np.int64)]),
            np.column_stack([history, at]),
            np.column_stack([is_padding, no_padding]),
            lines["item"].to_numpy(),
            lines["category"].to_numpy(),
        )
        return pl.DataFrame(columns), line[at]

    def _columns(
        self,
        users: np.ndarray,
        seconds: np.ndarray,
        places: np.ndarray,
        is_padding: np.ndarray,
        items: np.ndarray,
        categories: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Give the columns of samples from who they are of and, step by step, how long ago and the places of events."""
        columns = {dense_name(step): seconds[:, step] for step in range(self._num_steps)}
        columns[table_name(0)] = self._to_raw_id(users)
        for step in range(self._num_steps):
            for offset, values in ((1, items), (2, categories)):
                raw_ids = self._to_raw_id(values[places[:, step]])
                raw_ids[is_padding[:, step]] = MISSING_ID
                columns[table_name(offset + 2 * step)] = raw_ids
        return columns

    def _pick_positives(self, log: _Log) -> np.ndarray:
        """Events that become positives: the `points_per_user` of least hash among all but a user's first."""
        event = np.arange(len(log.run_of_event))
        nth = event - log.bounds[:-1][log.run_of_event]
        draws = self._draw(log.users[log.run_of_event], nth, _POSITION_STREAM)
        draws[nth == 0] = np.iinfo(np.uint64).max  # a user's first event has no history
        # all events, user after user as before, but each user's by their draws: so the place that the n-th event of a
        # user has in the log is, in `ranked`, the place of the user's n-th least draw
        ranked = np.lexsort((nth, draws, log.run_of_event))
        is_picked = np.zeros(len(event), bool)
        is_picked[ranked[nth < self._points_per_user]] = True
        return np.flatnonzero(is_picked & (nth > 0))

    def _pick_negatives(self, log: _Log, positives: np.ndarray) -> np.ndarray:
        """For each positive the event of another user of the same group, -1 where there is none.

        Drawn is among the events near the user's own, when the users of a group stand in the order of their last
        events, one's events after the other's.
        """
        begins = self.begins_group(log.owners)
        begins[:1] = True
        group_of_run = np.cumsum(begins) - 1
        # Lay the events out anew: groups as they are, in each the users by their last event. A group's events take up
        # the same places as before, so its bounds are those of the log.
        order = np.lexsort((log.last_times, group_of_run))
        lengths = np.diff(log.bounds)
        new_start = np.empty_like(lengths)
        new_start[order] = np.cumsum(lengths[order]) - lengths[order]
        # which event of the log stands at each new place: a user's events keep their order and move together
        moved_by = log.bounds[:-1] - new_start
        event_at = np.arange(len(log.times)) + np.repeat(moved_by[order], lengths[order])
        group_bounds = np.append(log.bounds[:-1][begins], len(log.times))

        # A window around the user's own events, `reach` places to each side, ends where the group ends.
        runs = log.run_of_event[positives]
        group, own_start, own_length = group_of_run[runs], new_start[runs], lengths[runs]
        reach = np.maximum(np.diff(group_bounds) // _NEIGHBOURHOODS, _LEAST_REACH)[group]
        low = np.maximum(own_start - reach, group_bounds[group])
        high = np.minimum(own_start + own_length + reach, group_bounds[group + 1])
        # Draw one of the window's other places: count from its beginning, and jump over the user's own.
        num_others = (high - low) - own_length
        draws = self._draw(log.users[runs], positives - log.bounds[runs], _NEGATIVE_STREAM)
        drawn = (draws % np.maximum(num_others, 1).astype(np.uint64)).astype(np.int64) + low
        drawn = np.where(drawn >= own_start, drawn + own_length, drawn)
        return np.where(num_others > 0, event_at[np.minimum(drawn, len(event_at) - 1)], -1)

    def _draw(self, users: np.ndarray, numbers: np.ndarray, stream: int) -> np.ndarray:
        key = np.uint64(self._seed * 4 + stream)
        return mix64(mix64(mix64(np.full(len(users), key)) ^ users.astype(np.uint64)) ^ numbers.astype(np.uint64))

    def _to_raw_id(self, ids: np.ndarray) -> np.ndarray:
        return ids % self._max_ind_range if self._max_ind_range else ids.copy()


def build(options: SourceOptions) -> TaobaoSource:
    """Give the source for a pipeline's options."""
    return TaobaoSource(
        seed=options.seed,
        history_length=options.history_length,
        points_per_user=options.points_per_user,
        max_ind_range=options.max_ind_range,
    )


def read_events(data: bytes, *, with_candidates: bool = False) -> tuple[pl.DataFrame, np.ndarray, int]:
    """Split lines into events.

    Args:
        data: Whole lines.
        with_candidates: Whether lines without behaviour are taken too.

    Returns:
        Events in order (user, item, category, time Int64; behaviour String, null of candidates), positions of lines
        that are none (ascending, int64), and the number of lines.
    """
    text, sound = read_fields(data, separator=",", names=list(FIELDS))
    numeric = [name for name in FIELDS if name != "behaviour"]
    behaves = pl.col("behaviour").is_in(BEHAVIOURS)
    is_event = (
        sound
        & text.select(
            pl.all_horizontal(
                *(pl.col(name).str.contains(r"^[0-9]{1,18}$") for name in numeric),
                behaves | pl.col("behaviour").is_null() if with_candidates else behaves,
            ).fill_null(value=False)
        ).to_series()
    )
    events = text.filter(is_event).with_columns(pl.col(numeric).cast(pl.Int64))
    return events, (~is_event).arg_true().to_numpy().astype(np.int64), text.height


class _Log:
    """Events in their final order, and where the run of each user, all of its events, lies.

    Args:
        events: By owner, then time.
    """

    def __init__(self, events: pl.DataFrame) -> None:
        owner_of_event = events[OWNER].to_numpy()
        is_first = np.ones(len(owner_of_event), bool)
        is_first[1:] = owner_of_event[1:] != owner_of_event[:-1]
        starts = np.flatnonzero(is_first)
        self.items, self.categories, self.times = (events[name].to_numpy() for name in ("item", "category", "time"))
        self.run_of_event = np.cumsum(is_first) - 1
        """Number of the run of each event."""
        self.bounds = np.append(starts, len(owner_of_event))
        """Where each run begins, and at the end the number of events."""
        self.owners = owner_of_event[starts]
        self.users = _user_of(self.owners).astype(np.int64)
        """Who each run is of."""
        self.last_times = self.times[self.bounds[1:] - 1]
        """When each user was seen last."""


def _order_as_text(users: np.ndarray) -> np.ndarray:
    """Numbers whose order is that of the users' decimal text: 1, 10, 100, 11, 2. Shape of `users`, uint64.

    Text order is that of the digits moved to the left, where shorter numbers come first among equals: as one number,
    the digits filled up with zeros on the right to 18 places, then how many there were.
    """
    num_digits = np.searchsorted(_POWERS[1:], users, side="right") + 1
    filled_up = users.astype(np.uint64) * _POWERS[_MOST_DIGITS - num_digits].astype(np.uint64)
    return filled_up * np.uint64(_MOST_DIGITS) + (num_digits - 1).astype(np.uint64)


def _user_of(owners: np.ndarray) -> np.ndarray:
    """Undo `_order_as_text`. Shape of `owners`, uint64."""
    filled_up, digits_less_one = np.divmod(owners, np.uint64(_MOST_DIGITS))
    return filled_up // _POWERS[_MOST_DIGITS - 1 - digits_less_one.astype(np.int64)].astype(np.uint64)


def _is_event(line: bytes) -> bool:
    return _explain(line.removesuffix(b"\r")) is None


def _explain(line: bytes) -> str | None:
    """Why a line is no event, None if it is one."""
    fields = line.split(b",")
    if len(fields) != len(FIELDS):
        return f"expected {len(FIELDS)} fields, found {len(fields)}"
    for name, field in zip(FIELDS, fields, strict=True):
        found = repr(field[:40].decode("utf-8", "backslashreplace"))
        if name == "behaviour":
            if field not in {behaviour.encode() for behaviour in BEHAVIOURS}:
                return f"behaviour: expected {', '.join(BEHAVIOURS)}, found {found}"
        elif not _NUMBER.fullmatch(field):
            return f"{name}: expected an integer of up to 18 digits, found {found}"
    return None
