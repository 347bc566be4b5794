from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from slipstream.config import build_pipeline
from slipstream.datasets import parsing, taobao
from slipstream.datasets.parsing import ParsedFiles, parse_files
from slipstream.datasets.taobao import TaobaoSource, read_events
from slipstream.errors import ConfigError, DataError
from slipstream.ops.parallel import Threads
from slipstream.ops.split import latest_seventh
from slipstream.pipeline import run_pipeline
from slipstream.progress import Silent
from slipstream.schema import MISSING_ID
from slipstream.skip_config import SkipConfig
from slipstream.training.skipping.staleness import sample_movement, sample_pull

LINE = b"1,2268318,2520377,pv,1511544070"
HISTORY, POINTS = 3, 2


def make_source(seed: int = 0) -> TaobaoSource:
    return TaobaoSource(seed=seed, history_length=HISTORY, points_per_user=POINTS)


def mix(word: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    mask = 2**64 - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def draw(seed: int, stream: int, user: int, number: int) -> int:
    return mix(mix(mix(seed * 4 + stream) ^ user) ^ number)


def make_samples_plainly(lines: list[bytes], users_per_group: int, seed: int = 0) -> list[list[int]]:
    """The samples of a log, written as the description of the source says, one by one."""
    of_user: dict[int, list[tuple[int, int, int]]] = {}
    for line in lines:
        user, item, category, _, time = line.decode().split(",")
        of_user.setdefault(int(user), []).append((int(time), int(item), int(category)))
    groups: list[list[tuple[int, list[tuple[int, int, int]]]]] = []
    for user, events in sorted(of_user.items(), key=lambda item: str(item[0])):
        if not groups or mix(user) % users_per_group == 0:
            groups.append([])
        groups[-1].append((user, sorted(events)))
    samples = []
    for group in groups:
        by_time = sorted(group, key=lambda run: run[1][-1][0])
        laid_out = [event for _, events in by_time for event in events]
        reach = max(len(laid_out) // 16, 64)
        for user, events in group:
            before = 0
            for run in by_time:
                if run[1] is events:
                    break
                before += len(run[1])
            near = [
                event
                for place, event in enumerate(laid_out)
                if before - reach <= place < before + len(events) + reach and not before <= place < before + len(events)
            ]
            chosen = sorted(range(1, len(events)), key=lambda nth: (draw(seed, 1, user, nth), nth))[:POINTS]
            for nth in sorted(chosen):
                past = events[max(0, nth - HISTORY) : nth]
                padding = HISTORY - len(past)
                seconds = [0] * padding + [events[nth][0] - time for time, _, _ in past] + [0]
                pairs = [MISSING_ID, MISSING_ID] * padding + [part for _, *pair in past for part in pair]
                hour = events[-1][0] // 3600
                samples.append([1, *seconds, user, *pairs, *events[nth][1:], hour])
                if near:
                    other = near[draw(seed, 2, user, nth) % len(near)]
                    samples.append([0, *seconds, user, *pairs, *other[1:], hour])
    return samples


@st.composite
def logs(draw_: st.DrawFn) -> list[bytes]:
    lines = []
    for user in draw_(st.lists(st.integers(0, 40) | st.integers(0, 10**18 - 1), min_size=1, max_size=12)):
        for _ in range(draw_(st.integers(1, 7))):
            item, time = draw_(st.integers(1, 9)), draw_(st.integers(0, 20_000))
            lines.append(b"%d,%d,%d,%s,%d" % (user, item, item % 3, draw_(st.sampled_from([b"pv", b"buy"])), time))
    return lines


@settings(max_examples=80)
@given(logs(), st.sampled_from([1, 2, 3, 1024]), st.integers(0, 3))
def test_samples_are_those_of_a_plain_reader(lines: list[bytes], users_per_group: int, seed: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taobao, "_USERS_PER_GROUP", users_per_group)
        parsed = make_source(seed).parse(b"\n".join(lines))
    assert [list(row) for row in parsed.samples.iter_rows()] == make_samples_plainly(lines, users_per_group, seed)
    assert parsed.num_lines == len(lines)


@settings(max_examples=20)
@given(logs(), st.integers(1, 1500), st.sampled_from([1, 2, 5]), st.randoms(use_true_random=False))
def test_samples_depend_neither_on_the_order_of_lines_nor_on_the_size_of_blocks(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], chunk_bytes: int, users_per_group: int, random: Random
):
    whole = [*lines, b"bad", lines[0].partition(b",")[0] + b",bad"] * 3
    shuffled = random.sample(whole, len(whole))
    folder = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taobao, "_USERS_PER_GROUP", users_per_group)
        patch.setattr(parsing, "_BYTES_PER_EVENT", 400)
        expected = make_source().parse(b"\n".join(whole))
        (folder / "a.csv").write_bytes(b"\n".join(shuffled[::2]))
        (folder / "b.csv").write_bytes(b"\n".join(shuffled[1::2]))
        parsed = parse_log([folder / "a.csv", folder / "b.csv"], folder, chunk_bytes=chunk_bytes)
    assert samples_of(parsed).equals(expected.samples)
    assert parsed.num_lines == len(whole)
    assert sum(chunk.num_rejected for chunk in parsed.lines) == len(expected.rejected_lines)


def parse_log(files: list[Path], folder: Path, *, chunk_bytes: int = 1 << 20) -> ParsedFiles:
    return parse_files(
        make_source(),
        files=[str(file) for file in files],
        folder=folder,
        chunk_bytes=chunk_bytes,
        max_reject_ratio=0.01,
        workers=2,
        progress=Silent(),
        engine=Threads(),
    )


def samples_of(parsed: ParsedFiles) -> pl.DataFrame:
    expected = make_source().parse(b"").samples
    read = [pl.from_arrow(parsed.store.open(chunk)) for chunk in parsed.samples]
    return pl.concat([frame.cast(expected.schema) for frame in read if isinstance(frame, pl.DataFrame)])


@given(st.lists(st.integers(0, 2000) | st.integers(0, 10**18 - 1), min_size=1))
def test_users_are_laid_out_as_text_and_come_back(users: list[int]):
    owners = taobao._order_as_text(np.array(users))
    assert taobao._user_of(owners).tolist() == users
    assert np.array(users)[np.argsort(owners)].tolist() == sorted(users, key=str)


def test_gathering_goes_on_where_it_stopped(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taobao, "_USERS_PER_GROUP", 4)
    expected = samples_of(parse_log([log], tmp_path / "whole"))
    parsed = parse_log([log], tmp_path / "killed", chunk_bytes=4096)
    assert len(parsed.samples) > 6 and len(parsed.lines) > 3
    for left in (tmp_path / "killed/parsed/00000.json", *(tmp_path / "killed/parsed").glob("00000-00000[3-9].json")):
        left.unlink()
    kept = (tmp_path / "killed/parsed/00000-000002.arrow").stat().st_mtime_ns
    again = parse_log([log], tmp_path / "killed", chunk_bytes=9000)
    assert len(again.samples) < len(parsed.samples), "stretches of another size from where it stopped"
    assert samples_of(again).equals(expected)
    assert (tmp_path / "killed/parsed/00000-000002.arrow").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "expected 5 fields, found 1"),
        (b"user,item,category,behaviour,time", "user: expected an integer of up to 18 digits, found 'user'"),
        (LINE + b",1", "expected 5 fields, found 6"),
        (LINE.replace(b"pv", b"view"), "behaviour: expected pv, cart, fav, buy, found 'view'"),
        (LINE.replace(b"1511544070", b"-1"), "time: expected an integer of up to 18 digits, found '-1'"),
        (LINE.replace(b"2268318", b""), "item: expected an integer"),
        (LINE.replace(b"2520377", b"1" * 19), "category: expected an integer of up to 18 digits"),
        (LINE.replace(b"2520377", b"\xff"), "category: expected an integer"),
    ],
)
def test_what_is_no_event_is_rejected_with_its_reason(line: bytes, reason: str):
    parsed = make_source().parse(LINE + b"\n" + line + b"\n" + LINE + b"\n")
    assert parsed.rejected_lines.tolist() == [1] and parsed.num_lines == 3
    assert make_source().explain(line).startswith(reason)


def test_a_text_without_events_has_no_samples():
    parsed = make_source().parse(b"bad\nworse\n")
    assert parsed.samples.height == 0 and parsed.rejected_lines.tolist() == [0, 1]
    assert make_source().parse(LINE).samples.height == 0, "one event has no history"


def test_events_without_any_history_stop_the_run(tmp_path: Path):
    (tmp_path / "log.csv").write_bytes(b"".join(b"%d,1,1,pv,1\n" % user for user in range(9)))
    with pytest.raises(DataError, match="no sample came of 9 events"):
        parse_log([tmp_path / "log.csv"], tmp_path)


def test_tables_are_shared_by_all_steps():
    source = make_source()
    assert source.table_of_column == (0, 1, 2, 1, 2, 1, 2, 1, 2)
    assert source.num_dense == 4 and source.num_tables == 3
    assert source.column_names["cat_1"] == "item-3" and source.column_names["cat_8"] == "category"
    assert source.format_raw_ids(np.array([7, MISSING_ID])).to_list() == ["7", ""]


def test_the_latest_seventh_is_whole_days():
    assert latest_seventh({1: 10, 2: 10, 3: 80, 4: 5, 5: 9}) == 4
    assert latest_seventh({1: 10, 2: 80, 3: 5, 4: 10}) == 3
    assert latest_seventh({1: 1, 2: 99}) == 2, "the last day is held out however large"
    assert latest_seventh({1: 0, 2: 0, 3: 0}) == 2, "never every day"


# --- through the pipeline ------------------------------------------------------------------------------------


def taobao_config(raw: Path, *, mode: str = "fae", optimizer: str = "rowwise_adagrad", **preprocess: Any) -> Any:
    return build_pipeline(
        {
            "name": "taobao_test",
            "dataset": {"source": "taobao", "raw": [str(raw)], "history_length": 5, "points_per_user": 4},
            "preprocess": {"split": "by_time", **preprocess},
            "profile": {"curve": [0.1]},
            "segregate": {"hot_budget": "20%"},
            "model": {"name": "tbsm", "embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [20, 1]},
            "train": {
                "mode": mode,
                "optimizer": optimizer,
                "batch_size": 32,
                "lr": 0.05,
                "device": "cpu",
                "cache_ratio": 1.0,
            },
        }
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 150 users whose tastes are a few categories each."""
    rng = np.random.default_rng(8)
    path = tmp_path_factory.mktemp("log") / "UserBehavior.csv"
    with path.open("w") as out:
        for user in range(1, 151):
            tastes = rng.integers(0, 30, 2)
            times = np.sort(rng.integers(0, 20 * 3600, rng.integers(2, 16)) + (user % 9) * 9000)
            for time in times:
                category = int(rng.choice(tastes))
                out.write(f"{user},{category * 10 + rng.integers(10)},{category},pv,{time}\n")
    return path


def test_users_are_on_one_side_of_the_split(log: Path, tmp_path: Path):
    done = run_pipeline(taobao_config(log), tmp_path, stages=["preprocess"]).stages["preprocess"].artifact
    counts = done.counts
    total = sum(counts["samples"].values())
    held_out = counts["samples"]["val"] + counts["samples"]["test"]
    assert 0 < held_out <= total / 7 and 0 <= counts["samples"]["test"] - counts["samples"]["val"] <= 1
    assert list(counts["rows_per_table"]) == ["cat_0", "cat_1", "cat_2"]
    late = pl.concat([pl.read_parquet(done.path / name / "*.parquet") for name in ("val", "test")])
    assert late["cat_0"].to_list() == [0] * held_out, "no user held out was seen in training"
    vocabulary = pl.read_parquet(done.path / "vocab/cat_1.parquet")
    padding = counts["padding_rows"]["cat_1"]
    assert vocabulary["raw_id"][padding] == ""
    train = pl.read_parquet(done.path / "train/*.parquet")
    items = train.select([f"cat_{1 + 2 * step}" for step in range(6)]).to_numpy()
    assert vocabulary["count"].to_list() == np.bincount(items.ravel(), minlength=len(vocabulary)).tolist()
    assert (items[:, -1] != padding).all(), "a candidate is never padding"
    is_padding = items == padding
    assert (is_padding[:, :-1] >= is_padding[:, 1:]).all(), "padding stands in front"
    assert (train.select([f"int_{step}" for step in range(6)]).to_numpy()[is_padding] == 0).all()


@pytest.mark.parametrize(("freq_threshold", "max_rows"), [(10**6, 0), (1, 2)])
def test_padding_keeps_its_row_however_small_the_table(log: Path, tmp_path: Path, freq_threshold: int, max_rows: int):
    config = taobao_config(log, freq_threshold=freq_threshold, max_rows=max_rows)
    counts = run_pipeline(config, tmp_path, stages=["preprocess"]).counts("preprocess")
    assert counts["rows_per_table"]["cat_1"] == 2 and counts["padding_rows"] == {"cat_1": 1, "cat_2": 1}


def test_hashing_a_padded_table_is_refused(log: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="padding must keep a row of its own"):
        run_pipeline(taobao_config(log, num_buckets=100), tmp_path, stages=["preprocess"])


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("mode", ["fae", "slipstream", "baseline", "cached"])
def test_every_mode_trains_and_padding_rows_stay_zero(log: Path, tmp_path: Path, mode: str, optimizer: str):
    result = run_pipeline(taobao_config(log, mode=mode, optimizer=optimizer), tmp_path)
    folder = result.stages["train"].artifact.path
    tables = load_file(folder / "model.safetensors")
    padding = result.counts("preprocess")["padding_rows"]
    for name, row in padding.items():
        assert not tables[f"tables.{name}"][row].any()
        assert tables[f"tables.{name}"].any(axis=1).sum() == len(tables[f"tables.{name}"]) - 1
    assert len(tables) > 3 and result.counts("train")["test"]["logloss"] > 0
    assert json.loads((folder / "model.json").read_text())["name"] == "tbsm"


@pytest.mark.parametrize("order", ["faithful", "loop"])
def test_padding_is_neither_stale_nor_changing(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str):
    seen: list[np.ndarray] = []

    def judge(movement: np.ndarray, slots: np.ndarray, *, alpha: float, tables: Sequence[int]) -> np.ndarray:
        seen.append(movement)
        assert list(tables) == [0, *(1, 2) * (slots.shape[1] // 2)], "the user, then item and category step by step"
        return sample_movement(movement, slots, alpha=alpha, tables=tables)

    module = "slipstream.training." + {"faithful": "faithful", "loop": "skipping.criteria.stale"}[order]
    monkeypatch.setattr(f"{module}.sample_movement", judge)
    config = taobao_config(log, mode="slipstream")
    config = replace(config, segregate=replace(config.segregate, hot_budget="90%"))
    train = replace(config.train, faithful=order == "faithful")
    skip = SkipConfig(movement="net", alpha=0.8, alpha_per="table")
    done = run_pipeline(replace(config, train=train, skip=skip), tmp_path)
    padding = done.counts("preprocess")["padding_rows"]
    with np.load(done.stages["segregate"].artifact.path / "slots.npz", allow_pickle=False) as slot_maps:
        expected = sorted(int(slot_maps[name][row]) for name, row in padding.items())
    assert expected[-1] < len(seen[0]), "padding is hot"
    assert all(np.flatnonzero(np.isnan(movement)).tolist() == expected for movement in seen)


def test_per_label_nothing_is_known_of_padding(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[np.ndarray] = []

    def judge(pulls: np.ndarray, slots: np.ndarray, labels: np.ndarray, *, alpha: float) -> np.ndarray:
        seen.append(pulls)
        return sample_pull(pulls, slots, labels, alpha=alpha)

    monkeypatch.setattr("slipstream.training.skipping.criteria.stale.sample_pull", judge)
    config = taobao_config(log, mode="slipstream")
    config = replace(config, segregate=replace(config.segregate, hot_budget="90%"), skip=SkipConfig())
    done = run_pipeline(config, tmp_path)
    padding = done.counts("preprocess")["padding_rows"]
    with np.load(done.stages["segregate"].artifact.path / "slots.npz", allow_pickle=False) as slot_maps:
        slots = [int(slot_maps[name][row]) for name, row in padding.items()]
    for pulls in seen:
        assert not pulls[:, slots].any(), "a mean is over known rows alone"
        assert np.count_nonzero(pulls) > pulls.size / 10
    assert seen


def test_modes_end_with_the_same_model(log: Path, tmp_path: Path):
    models = []
    for mode in ("fae", "resident"):
        result = run_pipeline(taobao_config(log, mode=mode), tmp_path)
        models.append(load_file(result.stages["train"].artifact.path / "model.safetensors"))
    for name, tensor in models[0].items():
        assert (tensor == models[1][name]).all(), name


def test_the_model_needs_sequences():
    with pytest.raises(ConfigError, match="is for source taobao, found"):
        build_pipeline({"name": "wrong", "dataset": {"source": "synthetic"}, "model": {"name": "tbsm"}})


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "num_users"), [("taobao_100001", 983), ("taobao_114users_10000", 114)])
def test_every_real_line_is_an_event(real_data: Path, name: str, num_users: int):
    data = gzip.decompress((real_data / f"{name}.csv.gz").read_bytes())
    events, rejected, num_lines = read_events(data)
    assert not rejected.size and num_lines == events.height == int(name.split("_")[-1])
    lines = [line.split(b",") for line in data.splitlines()]
    assert len({line[0] for line in lines}) == num_users
    shares = Counter(events["behaviour"].to_list())
    assert shares == Counter(line[3].decode() for line in lines)
    if name == "taobao_100001":
        found = {behaviour: round(100 * count / num_lines, 1) for behaviour, count in shares.items()}
        assert found == {"pv": 89.7, "cart": 5.4, "fav": 2.7, "buy": 2.1}


@pytest.mark.real_data
def test_real_samples_are_those_of_a_plain_reader(real_data: Path):
    data = gzip.decompress((real_data / "taobao_114users_10000.csv.gz").read_bytes())
    parsed = make_source().parse(data)
    expected = make_samples_plainly(data.splitlines(), users_per_group=1024)
    assert [list(row) for row in parsed.samples.iter_rows()] == expected


@pytest.mark.real_data
def test_real_events_go_through_the_pipeline(real_data: Path, tmp_path: Path):
    config = taobao_config(real_data / "taobao_114users_10000.csv.gz")
    result = run_pipeline(config, tmp_path)
    counts = result.counts("preprocess")
    assert counts["lines"] == 10_000 and counts["rejected"] == 0
    assert sum(counts["positives"].values()) * 2 == sum(counts["samples"].values())
    assert result.counts("segregate")["hot_sample_share"] > 0
    assert np.isfinite(result.counts("train")["test"]["logloss"])


@pytest.mark.real_data
def test_a_real_log_in_time_order_gives_the_samples_of_the_sorted_one(real_data: Path, tmp_path: Path):
    lines = gzip.decompress((real_data / "taobao_100001.csv.gz").read_bytes()).splitlines()
    by_time = sorted(lines, key=lambda line: int(line.rpartition(b",")[2]))
    published = ["preprocess"]
    results = []
    for name, content in (("by_user", lines), ("by_time", by_time)):
        (tmp_path / f"{name}.csv").write_bytes(b"\n".join(content) + b"\n")
        config = taobao_config(tmp_path / f"{name}.csv", chunk_bytes=500_000)
        done = run_pipeline(config, tmp_path / name, stages=published).stages["preprocess"].artifact
        results.append({key: entry["xxh3"] for key, entry in done.manifest["outputs"].items()})
        assert done.counts["lines"] == 100_001 and done.counts["rejected"] == 0
        events_of_user = Counter(line.partition(b",")[0] for line in lines)
        assert sum(done.counts["positives"].values()) == sum(min(count - 1, 4) for count in events_of_user.values())
    assert results[0] == results[1]
