"""Taobao UserBehavior logs, as sequences in the manner of TBSM.

A line is an event: user, item, category, behaviour (pv, cart, fav or buy), Unix time; commas between, no header. The
lines of a user stand together. A sample is what a user did last, and a candidate item: label 1 when the user took the
candidate next, 0 when it was drawn at random. Every behaviour counts as an event.

    cat_0 user; cat_1, cat_2 item and category of the oldest event, …, cat_41, cat_42 those of the candidate
    int_0 … int_20 seconds from each event to the candidate, 0 for the candidate
    day    hour (Unix time / 3600) of the user's last event, so that split `by_time` holds whole users out

There are three tables, user, item and category; all time steps look up the same. A history shorter than
`history_length` is padded in front with MISSING_ID.

Positives are up to `points_per_user` events of a user, drawn among all but the first. The negative beside each has
the same history and, as candidate, an event of another user: one of about a thousand that stand together in the file,
and of these one whose last event was at nearly the same time. So an item is a negative as often as it is a positive, no
list of all items is needed, and users held out by time draw from each other: with negatives from training users, a
model could tell them by having seen them. Draws hash the seed, the user and a number, not the place in a block.

Source: TBSM (facebookresearch/tbsm) and its taobao_prepare.py, which draw at most 10 positives and 10 negatives a user
from the last 200 events, give every step its position as dense value, and keep the whole log in memory.
"""

from __future__ import annotations

import re

import numpy as np
import polars as pl

from slipstream.datasets.source import ParsedBlock, Source, SourceOptions
from slipstream.ops.delimited import read_fields
from slipstream.ops.split import mix64
from slipstream.schema import LABEL, MISSING_ID, dense_name, table_name

BEHAVIOURS = ("pv", "cart", "fav", "buy")
"""What a user may do: look, put in the cart, mark, buy."""
FIELDS = ("user", "item", "category", "behaviour", "time")
"""Fields of a line, in order."""
USER, ITEM, CATEGORY = 0, 1, 2
"""Tables."""

_USERS_PER_CUT = 1024
_NEIGHBOURHOODS = 16  # negatives come from an eighth of a group: a sixteenth to each side
_LEAST_REACH = 64
_NUMBER = re.compile(rb"[0-9]{1,18}")
_POSITION_STREAM, _NEGATIVE_STREAM = 1, 2


class TaobaoSource(Source):
    """Events of users to samples of sequences.

    Args:
        seed: Draws positives and negatives.
        history_length: Past events in a sample.
        points_per_user: Positives of one user at most.
        max_ind_range: Ids are taken modulo this number; 0 keeps them.
    """

    num_tables = 3
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
        """Turn the events of whole groups of users into samples, and into rejects what is no event."""
        events, rejected, num_lines = read_events(data)
        return ParsedBlock(samples=self._make_samples(events), rejected_lines=rejected, num_lines=num_lines)

    def cut(self, data: bytes) -> int:
        """Where the last group of users in a text begins; 0 if only one is in it.

        A group begins with the first line of every user whose hash is a multiple of a thousand or so.
        """
        stop, run_user, prefix = data.rfind(b"\n"), -1, b""
        while stop > 0:
            start = data.rfind(b"\n", 0, stop) + 1
            # lines of one user follow one another, so nearly all are passed over at a glance
            if not (prefix and data.startswith(prefix, start)) and _is_event(data[start:stop]):
                digits = data[start:stop].partition(b",")[0]
                if int(digits) != run_user and run_user >= 0 and _begins_group(np.array([run_user]))[0]:
                    return _first_event(data, stop + 1)
                run_user, prefix = int(digits), digits + b","
            stop = start - 1
        return 0

    def explain(self, line: bytes) -> str:
        """Say why a line that `parse` rejected is no event."""
        return _explain(line) or "not an event line"

    def format_raw_ids(self, raw_ids: np.ndarray) -> pl.Series:
        """Write raw ids in decimal; MISSING_ID, the padding, as the empty string."""
        missing = pl.Series(raw_ids == MISSING_ID)
        text = pl.Series(raw_ids).cast(pl.String)
        return pl.select(pl.when(missing).then(pl.lit("")).otherwise(text)).to_series()

    def _make_samples(self, events: pl.DataFrame) -> pl.DataFrame:
        users = events["user"].to_numpy()
        is_first = np.ones(len(users), bool)
        is_first[1:] = users[1:] != users[:-1]
        run_starts = np.flatnonzero(is_first)
        run_of_event = np.cumsum(is_first) - 1
        run_users = users[run_starts]
        order = np.lexsort((events["time"].to_numpy(), run_of_event))
        items, categories, times = (events[name].to_numpy()[order] for name in ("item", "category", "time"))
        run_bounds = np.append(run_starts, len(users))

        positives = self._pick_positives(run_of_event, run_starts, run_users)
        runs = run_of_event[positives]
        last_times = times[run_bounds[1:] - 1]
        negatives = self._pick_negatives(positives, runs, run_bounds, last_times, users)

        # history steps, oldest first; places before the user's first event are padding
        places = positives[:, None] + np.arange(1 - self._num_steps, 1)
        is_padding = places < run_starts[runs][:, None]
        places = np.where(is_padding, positives[:, None], places)
        has_negative = negatives >= 0
        # positive, negative, positive, negative, … where there is one
        point = np.repeat(np.arange(len(positives)), 1 + has_negative)
        label = np.ones(len(point), np.uint8)
        label[1:][point[1:] == point[:-1]] = 0
        candidate = np.where(label == 1, positives[point], negatives[point])

        samples = {LABEL: label}
        seconds = times[positives][:, None] - times[places]
        for step in range(self._num_steps):
            samples[dense_name(step)] = np.where(is_padding[:, step], 0, seconds[:, step])[point]
        samples[table_name(0)] = self._to_raw_id(users[positives])[point]
        for step in range(self._num_steps):
            at = places[point, step] if step < self._num_steps - 1 else candidate
            for offset, values in ((1, items), (2, categories)):
                raw_ids = self._to_raw_id(values[at])
                raw_ids[is_padding[point, step]] = MISSING_ID
                samples[table_name(offset + 2 * step)] = raw_ids
        samples["day"] = (last_times[runs] // 3600)[point]
        return pl.DataFrame(samples)

    def _pick_positives(self, run_of_event: np.ndarray, run_starts: np.ndarray, run_users: np.ndarray) -> np.ndarray:
        """Events that become positives: the `points_per_user` of least hash among all but a user's first."""
        event = np.arange(len(run_of_event))
        nth = event - run_starts[run_of_event] if len(event) else event
        draws = self._draw(run_users[run_of_event], nth, _POSITION_STREAM)
        draws[nth == 0] = np.iinfo(np.uint64).max
        ranked = np.lexsort((nth, draws, run_of_event))
        # ranked lists the runs one after the other, each by its draws
        is_picked = np.zeros(len(event), bool)
        is_picked[ranked[nth < self._points_per_user]] = True
        return np.flatnonzero(is_picked & (nth > 0))

    def _pick_negatives(
        self, positives: np.ndarray, runs: np.ndarray, run_bounds: np.ndarray, last_times: np.ndarray, users: np.ndarray
    ) -> np.ndarray:
        """For each positive an event of another user of the same group, -1 where there is none.

        The users of a group stand in the order of their last events, one's events after the other's; drawn is
        among the events near the user's own.
        """
        lengths = np.diff(run_bounds)
        run_users = users[run_bounds[:-1]]
        begins = _begins_group(run_users)
        begins[:1] = True
        group_of_run = np.cumsum(begins) - 1
        order = np.lexsort((last_times, group_of_run))
        ends = np.cumsum(lengths[order])
        start_of_run = np.empty_like(lengths)
        start_of_run[order] = ends - lengths[order]
        event_at = np.repeat(run_bounds[:-1][order] - start_of_run[order], lengths[order]) + np.arange(len(users))
        group_bounds = np.append(run_bounds[:-1][begins], len(users))

        group = group_of_run[runs]
        reach = np.maximum(np.diff(group_bounds) // _NEIGHBOURHOODS, _LEAST_REACH)[group]
        start, stop = start_of_run[runs], start_of_run[runs] + lengths[runs]
        low = np.maximum(start - reach, group_bounds[group])
        high = np.minimum(stop + reach, group_bounds[group + 1])
        others = (high - low) - lengths[runs]
        draws = self._draw(run_users[runs], positives - run_bounds[runs], _NEGATIVE_STREAM)
        drawn = (draws % np.maximum(others, 1).astype(np.uint64)).astype(np.int64) + low
        drawn = np.where(drawn >= start, drawn + lengths[runs], drawn)
        return np.where(others > 0, event_at[np.minimum(drawn, len(users) - 1)], -1)

    def _draw(self, users: np.ndarray, numbers: np.ndarray, stream: int) -> np.ndarray:
        key = np.uint64(self._seed * 4 + stream)
        return mix64(mix64(mix64(np.full(len(users), key)) ^ users.astype(np.uint64)) ^ numbers.astype(np.uint64))

    def _to_raw_id(self, ids: np.ndarray) -> np.ndarray:
        return ids % self._max_ind_range if self._max_ind_range else ids.copy()


def build(options: SourceOptions) -> TaobaoSource:
    """The source for a pipeline's options."""
    return TaobaoSource(
        seed=options.seed,
        history_length=options.history_length,
        points_per_user=options.points_per_user,
        max_ind_range=options.max_ind_range,
    )


def read_events(data: bytes) -> tuple[pl.DataFrame, np.ndarray, int]:
    """Split lines into events.

    Args:
        data: Whole lines.

    Returns:
        Events in order (user, item, category, time Int64; behaviour String), positions of lines that are none
        (ascending, int64), and the number of lines.
    """
    text, sound = read_fields(data, separator=",", names=list(FIELDS))
    numeric = [name for name in FIELDS if name != "behaviour"]
    is_event = (
        sound
        & text.select(
            pl.all_horizontal(
                *(pl.col(name).str.contains(r"^[0-9]{1,18}$") for name in numeric),
                pl.col("behaviour").is_in(BEHAVIOURS),
            ).fill_null(value=False)
        ).to_series()
    )
    events = text.filter(is_event).with_columns(pl.col(numeric).cast(pl.Int64))
    return events, (~is_event).arg_true().to_numpy().astype(np.int64), text.height


def _begins_group(users: np.ndarray) -> np.ndarray:
    return np.asarray(mix64(users.astype(np.uint64)) % np.uint64(_USERS_PER_CUT) == 0)


def _first_event(data: bytes, start: int) -> int:
    """Where the first event at or after a line begins; there is one."""
    while not _is_event(data[start : (stop := data.index(b"\n", start))]):
        start = stop + 1
    return start


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
