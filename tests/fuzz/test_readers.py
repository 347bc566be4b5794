"""Damaged input, case after case: a result or an error of ours, never another exception, a hang, or much memory.

Each case takes something valid and damages it: bytes flipped, removed, repeated, put in, fields exchanged. The suite
tries a few cases of each reader; `make fuzz` tries 100,000 (`SLIPSTREAM_FUZZ` sets the number). A case is its seed:
what fails names the first and the number of those it was tried with, and `SLIPSTREAM_FUZZ_FROM=SEED
SLIPSTREAM_FUZZ=NUMBER` runs them again.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import xxhash
import zstandard
from raw_logs import make_lines
from safetensors.numpy import save
from trained import artifact_of, train

from slipstream.dataset_schema import ColumnsConfig, TableLayout
from slipstream.datasets.avazu import AvazuSource
from slipstream.datasets.criteo import CriteoSource
from slipstream.datasets.dlrm_npz import DlrmNpzSource
from slipstream.datasets.dlrm_npz import build as build_npz
from slipstream.datasets.source import GroupingSource, Source, SourceOptions
from slipstream.datasets.table import TableSource
from slipstream.datasets.taobao import TaobaoSource
from slipstream.errors import SlipstreamError
from slipstream.io.artifacts import open_artifact
from slipstream.io.raw import read_blocks
from slipstream.io.samples import read_shard
from slipstream.serving.examples import FILE, read_examples
from slipstream.training import checkpoint
from slipstream.training.checkpoint import Checkpointer
from slipstream.training.model_file import load_model, read_tensors

CASES = int(os.environ.get("SLIPSTREAM_FUZZ", "25"))
FIRST_CASE = int(os.environ.get("SLIPSTREAM_FUZZ_FROM", "0"))
LINES_AT_ONCE = 16
"""Damaged pieces of a log that are parsed as one block."""
SECONDS_AT_MOST = 20
"""For one check; none needs a hundredth of it."""
MEMORY_AT_MOST = 512 << 20
"""Bytes by which a reader's cases may raise the process's peak; the inputs have some thousand."""

TOKENS = [
    *(b"\n", b"\r\n", b"\r", b"\t", b",", b";", b'"', b'""', b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b" ", b"\\N"),
    *(b"-1", b"+1", b"1e999", b"nan", b"inf", b"9223372036854775808", b"-9223372036854775809", b"0" * 400, b"null"),
    *(b"{", b"}", b"[", b"]", b":", b"true", b"../", b"/etc/passwd", b"\xed\xa0\x80", b"\x80" * 9, "é".encode()),
    *(
        b"<i8",
        b"|O",
        b"'fortran_order': True",
        b"PK\x05\x06",
        b"PAR1",
        b"\x1f\x8b",
        b"\x28\xb5\x2f\xfd",
        b"__metadata__",
    ),
]


def check_damaged(valid: bytes, check: Callable[[bytes, Random], None]) -> None:
    """Check something valid after one to four damages, case after case, each drawn by its seed alone."""
    check_damaged_together(valid, lambda cases, drawn: check(cases[0], drawn), at_once=1)


def check_damaged_together(valid: bytes, check: Callable[[list[bytes], Random], None], *, at_once: int) -> None:
    """Check as many cases at once as cost little more than one.

    What else a check draws comes from the first case's generator. A plain loop, because a shrunk seed is no smaller a
    case and 100,000 of them must not take a day.
    """
    before = _peak_bytes()
    for first in range(FIRST_CASE, FIRST_CASE + CASES, at_once):
        drawn = [Random(seed) for seed in range(first, min(first + at_once, FIRST_CASE + CASES))]
        cases = [damage(valid, one) for one in drawn]
        try:
            with in_time():
                check(cases, drawn[0])
        except BaseException as exc:
            exc.add_note(f"{len(cases)} cases from {first} on: {cases}")
            raise
    assert _peak_bytes() - before < MEMORY_AT_MOST, "bounded memory"


def damage(valid: bytes, drawn: Random) -> bytes:
    """Damage bytes one to four times."""
    data = valid
    for _ in range(drawn.randint(1, 4)):
        start = drawn.randint(0, len(data))
        length = drawn.choice([0, 1, 1, 2, 4, 8, 40, 400])
        put = drawn.choice([nothing, a_token, some_bytes, another_piece])(data, drawn)
        data = data[:start] + put + data[start + length :]
        if drawn.random() < 0.1:
            data = data[: drawn.randint(0, len(data))]
    return data


def nothing(data: bytes, drawn: Random) -> bytes:
    return b""


def a_token(data: bytes, drawn: Random) -> bytes:
    return drawn.choice(TOKENS)


def some_bytes(data: bytes, drawn: Random) -> bytes:
    return drawn.randbytes(drawn.randint(1, 8))


def another_piece(data: bytes, drawn: Random) -> bytes:
    start = drawn.randint(0, len(data))
    return data[start : start + drawn.randint(1, 300)]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def in_time() -> Iterator[None]:
    """Raise where a case hangs."""

    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"a check took more than {SECONDS_AT_MOST} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_AT_MOST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_reading(read: Callable[[], object]) -> object:
    """A result, or None after an error that names what was found."""
    try:
        return read()
    except SlipstreamError as error:
        assert str(error)
        return None


# lines ----------------------------------------------------------------------------------------------------------------

CRITEO = b"\n".join(make_lines(3)) + b"\n"
AVAZU = (
    b"1000009418151094273,0,14102100,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,a99f214a,"
    b"ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79\n"
) * 3
TAOBAO = b"1,2268318,2520377,pv,1511544070\n1,2268319,2520377,buy,1511544071\n23,5,7,cart,1511544072\n"
TABLE = b'7,4711,Bern,3.5,2024-05-01T12:00:00,1\n8,"a,b","say ""hi""",,2024-05-02,0\n9,x,y,-1e3,2024-05-03T00:00,1\n'
NPZ_LINES = b"1\t1\t2\t3\t4\n0\t5\t6\t7\t8\n"
COLUMNS = ColumnsConfig(label="clicked", sparse=("user", "city"), dense=("price",), time="when", keep=("id",))
LAYOUT = TableLayout(columns=COLUMNS, names=("id", "user", "city", "price", "when", "clicked"))
SOURCES: dict[str, tuple[Source, bytes]] = {
    "criteo": (CriteoSource(), CRITEO),
    "criteo, ids modulo": (CriteoSource(max_ind_range=1000), CRITEO),
    "avazu": (AvazuSource(), AVAZU),
    "taobao": (TaobaoSource(seed=0, history_length=3, points_per_user=2), TAOBAO),
    "table": (
        TableSource(TableLayout(columns=COLUMNS, names=("id", "user", "city", "price", "when", "clicked"))),
        TABLE,
    ),
    "dlrm_npz": (DlrmNpzSource(num_dense=2, num_tables=2), NPZ_LINES),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_line_becomes_a_sample_or_a_reject_with_a_reason(name: str):
    source, valid = SOURCES[name]

    def check(cases: list[bytes], drawn: Random) -> None:
        data = b"".join(case if case.endswith(b"\n") else case + b"\n" for case in cases)  # blocks hold whole lines
        block = try_reading(lambda: parse(source, data))
        assert block is not None, "lines are rejected, they raise nothing"
        assert block.num_lines == data.count(b"\n")
        assert block.samples.height + block.rejected_lines.size == block.num_lines
        position = drawn.randrange(block.num_lines)
        line = data.split(b"\n")[position]
        alone = parse(source, line + b"\n")
        assert (position in block.rejected_lines) == (alone.rejected_lines.size == 1), "as it is judged alone"
        if alone.rejected_lines.size:
            assert source.explain(line)

    check_damaged_together(valid, check, at_once=LINES_AT_ONCE)


def parse(source: Source, data: bytes):
    if isinstance(source, GroupingSource):
        block = source.parse_events(data)
        source.make_samples(block.samples)
        return block
    return source.parse(data)


# files ----------------------------------------------------------------------------------------------------------------


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def parquet(frame: pl.DataFrame) -> bytes:
    stream = io.BytesIO()
    frame.write_parquet(stream)
    return stream.getvalue()


RAW_FILES = {
    "log": CRITEO,
    "log.gz": gzip.compress(CRITEO),
    "log.zst": zstandard.compress(CRITEO),
    "log.parquet": parquet(pl.DataFrame({"label": [0, 1], "text": ["a", None], "number": [1.5, None]})),
    "log.npz": npz(y=np.array([0, 1]), X_int=np.ones((2, 3), np.int32), X_cat=np.asfortranarray(np.ones((2, 2)))),
}


@pytest.mark.parametrize("name", RAW_FILES)
def test_a_raw_file_is_read_or_refused(tmp_path: Path, name: str):
    path = tmp_path / name

    def check(data: bytes, _: Random) -> None:
        path.write_bytes(data)
        try_reading(lambda: list(read_blocks(str(path), file_index=0, block_bytes=1 << 12)))

    check_damaged(RAW_FILES[name], check)


def test_the_widths_of_an_npz_log_are_read_or_refused(tmp_path: Path):
    path = tmp_path / "log.npz"

    def check(data: bytes, _: Random) -> None:
        path.write_bytes(data)
        try_reading(lambda: build_npz(SourceOptions(files=[str(path)])))

    check_damaged(RAW_FILES["log.npz"], check)


def test_a_shard_is_read_or_refused(tmp_path: Path):
    path = tmp_path / "shard.npz"
    valid = npz(X_int=np.ones((2, 3), np.float32), X_cat=np.ones((2, 2), np.int32), y=np.ones(2, np.float32))

    def check(data: bytes, _: Random) -> None:
        path.write_bytes(data)
        try_reading(lambda: read_shard(path))

    check_damaged(valid, check)


def test_the_examples_of_a_model_are_read_or_refused(tmp_path: Path):
    def check(data: bytes, _: Random) -> None:
        (tmp_path / FILE).write_bytes(data)
        try_reading(lambda: read_examples(tmp_path))

    check_damaged(npz(dense=np.ones((2, 3), np.float32), rows=np.ones((2, 2), np.int64)), check)


def test_a_safetensors_file_is_read_or_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    valid = save({"tables.cat_0": np.ones((3, 2), np.float32), "dense.top.0.bias": np.zeros(1, np.float32)})

    def check(data: bytes, _: Random) -> None:
        path.write_bytes(data)
        try_reading(lambda: read_tensors(path))

    check_damaged(valid, check)


def test_a_manifest_is_read_or_refused(tmp_path: Path):
    manifest = {
        "stage": "train",
        "config": {"lr": 0.1},
        "inputs": {"segregate": "00ff"},
        "outputs": {"model.json": {"bytes": 3, "xxh3": "00ff"}, "val/part-0.parquet": {"bytes": 0, "xxh3": ""}},
        "counts": {"steps": 3},
    }
    valid = json.dumps(manifest, indent=1).encode()

    def check(data: bytes, _: Random) -> None:
        (tmp_path / "manifest.json").write_bytes(data)
        try_reading(lambda: open_artifact(tmp_path))

    check_damaged(valid, check)


def test_the_description_of_a_model_is_read_or_refused(tmp_path: Path, tiny_runs: Path):
    trained = artifact_of(train(tiny_runs)).path
    (tmp_path / "model.safetensors").symlink_to(trained / "model.safetensors")
    valid = (trained / "model.json").read_bytes()
    (tmp_path / "model.json").write_bytes(valid)
    load_model(tmp_path)  # undamaged it is a model

    def check(data: bytes, _: Random) -> None:
        (tmp_path / "model.json").write_bytes(data)
        try_reading(lambda: load_model(tmp_path))

    check_damaged(valid, check)


@pytest.mark.parametrize("part", [".json", ".safetensors"])
def test_a_checkpoint_goes_on_where_it_was_or_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    state = {"totals": {"steps": 3}, "position": {"epoch": 1}}
    weights = save({"device.0": np.ones((3, 2), np.float32)})
    body = {
        "format": checkpoint._FORMAT,
        "fingerprint": "00ff",
        "state": state,
        "xxh3": xxhash.xxh3_64_hexdigest(weights),
    }
    plain = json.dumps({"xxh3": checkpoint._digest(body), "body": body}, indent=1).encode()
    valid = {".json": plain, ".safetensors": weights}
    path = tmp_path / "checkpoint-000000000003.json"
    restored: list[object] = []
    monkeypatch.setattr(checkpoint, "restore_state", lambda trainer, state, weights, clone: restored.append(state))
    trainer: Any = SimpleNamespace(totals=SimpleNamespace(steps=3))

    def restore() -> bool:
        restored.clear()
        return Checkpointer(tmp_path, fingerprint="00ff", every_steps=1, every_minutes=0).restore(trainer)

    for suffix, content in valid.items():
        path.with_suffix(suffix).write_bytes(content)
    assert restore()  # undamaged it is a checkpoint

    def check(data: bytes, _: Random) -> None:
        for suffix, content in (valid | {part: data}).items():
            path.with_suffix(suffix).write_bytes(content)
        is_restored = try_reading(restore)
        assert restored == ([state] if is_restored else []), "what is not exactly the state is not used"
        assert path.exists() == is_restored
        assert data == valid[part] or part == ".json" or not is_restored

    check_damaged(valid[part], check)
