"""Lines that take others of their user to be scored: histories by a plain loop, and the samples of training."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

import slipstream
from slipstream.errors import ConfigError, DataError
from slipstream.pipeline import score_lines
from slipstream.schema import MISSING_ID
from slipstream.serving import group_scorer
from slipstream.serving.model import ServedModel
from slipstream.stages import score as stage

HISTORY = 3
Event = tuple[int, int, int]


def make_log(num_users: int = 60, *, seed: int = 3) -> list[bytes]:
    """Events in time order, so that those of a user stand far apart; some users have one only."""
    random = Random(seed)
    lines = []
    for user in range(1, num_users + 1):
        for _ in range(random.choice([1, 2, 3, 9, 14])):
            item = random.randrange(1, 30)
            behaviour = random.choice(["pv", "pv", "cart", "buy"])
            lines.append((random.randrange(200_000), f"{user},{item},{item % 5},{behaviour}"))
    lines.sort()
    return [f"{text},{1_511_544_070 + second}".encode() for second, text in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[slipstream.api.Result, list[bytes]]:
    folder = tmp_path_factory.mktemp("taobao")
    log = make_log()
    (folder / "log.csv").write_bytes(b"\n".join(log))
    options = {"dataset.raw": str(folder / "log.csv"), "dataset.history_length": HISTORY, "train.mode": "resident"}
    return slipstream.run("taobao", {**options, "train.batch_size": 16}, runs=folder / "runs"), log


def score(model: Path, folder: Path, *files: list[bytes], **options: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    for number, lines in enumerate(files):
        (folder / f"log_{number}.csv").write_bytes(b"\n".join(lines))
    names = [str(folder / f"log_{number}.csv") for number in range(len(files))]
    counts = score_lines([model], raw=names, out=folder / "scores.parquet", **options)
    return pl.read_parquet(folder / "scores.parquet"), counts


def predict_plainly(model: ServedModel, lines: list[bytes]) -> list[float | None]:
    """Every line's probability, from a history that is looked for line by line."""
    fields = [line.decode().split(",") for line in lines]
    samples: list[dict[str, int]] = []
    at = []
    for number, (user, item, category, behaviour, time) in enumerate(fields):
        own = (int(time), not behaviour, int(item), int(category), number)
        past = sorted(
            (int(t), int(i), int(c))
            for other, (u, i, c, b, t) in enumerate(fields)
            if u == user and b and (int(t), False, int(i), int(c), other) < own
        )[-HISTORY:]
        if not past:
            continue
        padding = HISTORY - len(past)
        steps = [(0, MISSING_ID, MISSING_ID)] * padding + [(int(time) - t, i, c) for t, i, c in past]
        steps.append((0, int(item), int(category)))
        sample = {f"int_{step}": seconds for step, (seconds, _, _) in enumerate(steps)} | {"cat_0": int(user)}
        for step, (_, i, c) in enumerate(steps):
            sample |= {f"cat_{1 + 2 * step}": i, f"cat_{2 + 2 * step}": c}
        samples.append(sample)
        at.append(number)
    found: list[float | None] = [None] * len(lines)
    for number, probability in zip(at, model.predict_parsed(pl.DataFrame(samples)).tolist(), strict=True):
        found[number] = probability
    return found


def test_every_line_has_the_probability_of_its_users_history(trained, tmp_path: Path):
    result, log = trained
    lines, counts = score(result.model, tmp_path, log, keep=["item"])
    expected = predict_plainly(ServedModel(result.model), log)
    assert lines["probability"].to_list() == expected
    assert (counts["lines"], counts["samples"]) == (len(log), len(log) - expected.count(None))
    alone = lines.filter(pl.col("probability").is_null())
    assert alone["reason"].unique().to_list() == ["no event of this user before it"]
    assert alone.height == 60
    assert lines["item"].to_list() == [line.decode().split(",")[1] for line in log]
    assert "quality" not in counts


def test_positives_of_training_get_what_training_predicted(trained, tmp_path: Path):
    """A sample that training held out is the event of a line: to the bit the same probability."""
    result, log = trained
    lines, _ = score(result.model, tmp_path, log)
    known = set(lines["probability"].drop_nulls().to_list())
    for split in ("test", "val"):
        held_out = result.predictions(split).filter(label=1)["probability"].to_list()
        assert held_out and set(held_out) <= known


def test_a_candidate_is_scored_after_the_events_of_its_second_and_is_nobodys_history(trained, tmp_path: Path):
    result, log = trained
    model = ServedModel(result.model)
    user, _, _, _, time = log[len(log) // 2].decode().split(",")
    candidates = [f"{user},{item},{item % 5},,{time}".encode() for item in (1, 7, 29)]
    nobody = b"987654,3,3,,1511544071"
    mixed = [candidates[0], *log[:40], nobody, *log[40:], *candidates[1:]]
    lines, _ = score(result.model, tmp_path, mixed)
    expected = predict_plainly(model, mixed)
    assert lines["probability"].to_list() == expected
    assert lines["reason"][41] == "no event of this user before it"
    events = [number for number, line in enumerate(mixed) if b",," not in line]
    assert [expected[number] for number in events] == predict_plainly(model, log)


def test_neither_the_order_of_lines_nor_how_they_are_cut_changes_a_probability(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result, log = trained
    whole, _ = score(result.model, tmp_path / "whole", log)
    of_line = dict(zip(log, whole["probability"], strict=True))
    shuffled = Random(1).sample(log, len(log))
    monkeypatch.setattr(stage, "_BLOCK_BYTES", 600)
    monkeypatch.setattr(group_scorer, "_EVENTS_AT_ONCE", 16)
    monkeypatch.setattr(group_scorer, "_SAMPLED", 4)
    lines, _ = score(result.model, tmp_path / "cut", [*shuffled[:100], b"no event", *shuffled[100:150]], shuffled[150:])
    assert lines["reason"][100] == "expected 5 fields, found 1"
    assert lines["line"].to_list() == [*range(1, 152), *range(1, len(log) - 149)]
    found = lines.filter(pl.col("reason") != "expected 5 fields, found 1", pl.col("reason").is_not_null())
    assert found.height == 60
    probabilities = [value for at, value in enumerate(lines["probability"]) if at != 100]
    assert probabilities == [of_line[line] for line in shuffled]


@pytest.mark.parametrize("dies_in", ["_write_events", "_place", "number"])
def test_a_killed_run_goes_on_from_what_it_has(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str):
    result, log = trained
    monkeypatch.setattr(stage, "_BLOCK_BYTES", 600)
    monkeypatch.setattr(group_scorer, "_EVENTS_AT_ONCE", 16)
    monkeypatch.setattr(group_scorer, "_SAMPLED", 4)
    whole, counts = score(result.model, tmp_path / "whole", log)
    original = getattr(group_scorer.GroupScorer, dies_in)
    calls = []

    class Killed(BaseException):
        pass

    def die_at_the_third(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3 or dies_in == "_place":
            raise Killed
        return original(self, *arguments, **options)

    with monkeypatch.context() as dying:
        dying.setattr(group_scorer.GroupScorer, dies_in, die_at_the_third)
        with pytest.raises(Killed):
            score(result.model, tmp_path / "killed", log)
    work = tmp_path / "killed" / ".scores.parquet.partial" / "work"
    kept = {path: path.stat().st_mtime_ns for path in [*work.rglob("*.arrow"), *work.rglob("*.parquet")]}
    assert kept
    made: list[Path] = []
    write = group_scorer.write_atomically
    monkeypatch.setattr(group_scorer, "write_atomically", lambda path: (made.append(path), write(path))[1])
    lines, again = score(result.model, tmp_path / "killed", log)
    assert lines.drop("file").equals(whole.drop("file"))
    assert not set(made) & set(kept)  # what was whole is not made again
    assert {**again, "output": ""} == {**counts, "output": ""}
    assert not list((tmp_path / "killed").glob(".*"))


def test_standard_input_is_kept_until_it_is_read_twice(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result, log = trained
    out = tmp_path / "scores.parquet"

    def score_stdin(lines: list[bytes]) -> pl.DataFrame:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
        score_lines([result.model], raw=["-"], out=out, keep=["item"])
        return pl.read_parquet(out)

    class Killed(BaseException):
        pass

    def die(self):
        assert [path.name for path in tmp_path.glob("*stdin*")] == [".scores.parquet.stdin-0.zst"]
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(group_scorer.GroupScorer, "_place", die)
        with pytest.raises(Killed):
            score_stdin(log[::-1][:50])  # what it leaves is of other lines
    found = score_stdin(log)
    assert found["file"].unique().to_list() == ["-"]
    expected, _ = score(result.model, tmp_path / "file", log, keep=["item"])
    assert found.drop("file").equals(expected.drop("file"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_python_gives_the_same_and_says_what_cannot_be(trained, tmp_path: Path):
    result, log = trained
    lines, _ = score(result.model, tmp_path, log)
    model = slipstream.load(result.model)
    assert model.score(tmp_path / "log_0.csv")["probability"].equals(lines["probability"])
    with pytest.raises(DataError, match="reads text only, found columns"):
        model.score(pl.DataFrame({"user": [1]}))
    with pytest.raises(ConfigError, match="found `shoe_size`"):
        score_lines([result.model], raw=[str(tmp_path / "log_0.csv")], out=tmp_path / "x.parquet", keep=["shoe_size"])
    empty, counts = score(result.model, tmp_path / "empty", [])
    assert empty.height == counts["lines"] == 0
