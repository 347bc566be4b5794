"""Training as a whole: every exact mode gives the same model, and it is the one of a plain loop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import current_thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from strategies import tiny_config
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear
from trained import HELD, artifact_of, assert_same_training, losses_of, model_of, predictions_of, train

from slipstream.embedding.tiers.lookahead import Batch, LookAhead
from slipstream.embedding.tiers.rows import TieredRows
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.io.samples import Samples, concat_samples, read_shard
from slipstream.pipeline import RunResult
from slipstream.schema import table_name
from slipstream.stages import train as train_stage
from slipstream.training import loop
from slipstream.training.model_file import save_model
from slipstream.training.skipping.criteria.stale import PulledStale
from slipstream.training.skipping.trackers import RowTracker

TABLES = [table_name(index) for index in range(26)]


def samples_of(result: RunResult, group: str) -> Samples:
    return concat_samples([read_shard(path) for path in result.stages["segregate"].artifact.files(f"{group}/", ".npz")])


def slot_maps_of(result: RunResult) -> list[np.ndarray]:
    with np.load(result.stages["segregate"].artifact.path / "slots.npz", allow_pickle=False) as arrays:
        return [arrays[name] for name in TABLES]


@pytest.fixture(scope="module")
def fae(tiny_runs: Path) -> RunResult:
    return train(tiny_runs, train__mode="fae", train__log_every=10)


# --- the same model, wherever rows live ----------------------------------------------------------------------


RESIDENT: dict[str, Any] = {"train__mode": "resident"}
BASELINE: dict[str, Any] = {"train__mode": "baseline"}
RANK: dict[str, Any] = {"train__mode": "cached", "train__cache_policy": "rank", "train__cache_ratio": 0.5}
LFU: dict[str, Any] = {"train__mode": "cached", "train__cache_policy": "lfu", "train__cache_ratio": 0.5}
ONE_CHUNK: dict[str, Any] = {"train__mode": "fae", "train__chunk_batches": 50, "train__staging_rows": 900}
EVERYWHERE = [RESIDENT, BASELINE, RANK, LFU, ONE_CHUNK]
NOTHING_SKIPPED: list[dict[str, Any]] = [
    {"train__mode": "fae", "train__chunk_batches": 1},
    {"train__mode": "slipstream", "skip__target_drop": 0.0},
    {"train__mode": "slipstream", "skip__threshold": 0.0},
    {"train__mode": "slipstream", "skip__criterion": "none"},
    {"train__mode": "slipstream", "skip__criterion": "random", "skip__target_drop": 0.0},
]
ADAM: dict[str, Any] = {"train__optimizer": "adam", "train__lr": 0.003}
IN_PLACE: dict[str, Any] = {"train__mode": "baseline", "train__cold_access": "in_place"}
SHUFFLED_THERE = IN_PLACE | {"train__shuffle_on": "device"}
AVERAGED: dict[str, Any] = {"train__average": 0.4}


@pytest.mark.parametrize(
    ("held", "options", "place"),
    [
        *(("dense", {}, place) for place in EVERYWHERE + NOTHING_SKIPPED),
        *(("mixed", {}, place) for place in EVERYWHERE),
        *((held, {}, place) for held in ("int4", "int8", "tt") for place in (BASELINE, LFU)),
        *(("by rank", AVERAGED, place) for place in (RANK, IN_PLACE)),
        *((held, ADAM, place) for held in ("dense", "mixed") for place in (RESIDENT, BASELINE, RANK)),
        ("dense", ADAM, NOTHING_SKIPPED[2]),
        *((held, AVERAGED, place) for held in ("dense", "mixed") for place in (RESIDENT, BASELINE, LFU)),
        *(("dense", options, IN_PLACE) for options in ({}, ADAM)),
        *((held, options, SHUFFLED_THERE) for held, options in (("mixed", {}), ("dense", AVERAGED))),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else " ".join(f"{k.split('__')[1]}={v}" for k, v in value.items()) or "plain"
    ),
)
def test_every_exact_mode_gives_the_same_model_to_the_bit(
    tiny_runs: Path, held: str, options: dict[str, Any], place: dict[str, Any]
):
    first = train(tiny_runs, train__mode="fae", tables=HELD[held], **options)
    other = train(tiny_runs, tables=HELD[held], **options, **place)
    assert artifact_of(other).path != artifact_of(first).path
    assert other.stages["segregate"].artifact.path == first.stages["segregate"].artifact.path
    assert_same_training(first, other)
    if place["train__mode"] == "cached":
        assert 0 < other.counts("train")["hit_ratio"] < 1


@pytest.mark.parametrize(
    "options",
    [
        {"train__mode": "slipstream"},
        {"train__mode": "fae", "tables": HELD["mixed"], **ADAM, **AVERAGED},
        {"train__mode": "baseline", "train__optimizer": "sgd"},
        {**LFU, "train__optimizer": "adagrad"},
    ],
    ids=lambda options: options["train__mode"],
)
def test_cold_rows_in_a_file_give_the_same_model_to_the_bit(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    in_memory = train(tiny_runs, **options)
    read: list[int] = []
    gather = TieredRows.gather
    monkeypatch.setattr(TieredRows, "gather", lambda rows, slots: read.append(len(slots)) or gather(rows, slots))

    def save(*args: Any, **parts: Any) -> None:
        read.clear()
        save_model(*args, **parts)
        assert max(read) == 30, "never a whole table"

    monkeypatch.setattr("slipstream.stages.train.save_model", save)
    monkeypatch.setattr("slipstream.training.model_file.CHUNK_ROWS", 30)
    monkeypatch.setattr("slipstream.training.assemble._DRAWN_ROWS", 30)
    who_waits: set[str] = set()
    fetch = RowMover.fetch
    monkeypatch.setattr(RowMover, "fetch", lambda *args: who_waits.add(current_thread().name) or fetch(*args))
    in_file = train(tmp_path, train__cold_path=str(tmp_path / "disk"), **options)
    assert_same_training(in_memory, in_file)
    assert all(name.startswith("look-ahead") for name in who_waits), "for the disk, while the step computes"
    assert who_waits
    tiers, on_disk = (result.counts("train")["bytes_per_tier"] for result in (in_memory, in_file))
    assert on_disk == {**tiers, "cold": 0, "disk": tiers["cold"]}
    assert list((tmp_path / "disk").iterdir()) == []


def test_the_mean_is_of_the_last_steps_and_training_goes_on_from_the_weights(tiny_runs: Path, fae: RunResult):
    mean = train(tiny_runs, train__mode="fae", **AVERAGED)
    assert losses_of(mean) == losses_of(fae)
    assert not np.array_equal(predictions_of(mean, "test"), predictions_of(fae, "test"))
    assert 0.35 < mean.counts("train")["averaged_steps"] / mean.counts("train")["steps"] < 0.45


def test_a_cache_too_small_for_a_batch_is_made_larger_and_says_so(tiny_runs: Path, fae: RunResult):
    cached = train(tiny_runs, train__mode="cached", train__cache_ratio=0.001, train__log_every=10)
    assert_same_training(fae, cached)
    [warning] = cached.counts("train")["warnings"]
    assert "`train.cache_ratio` = 0.001" in warning and "two batches of" in warning
    rows = cached.counts("segregate")["rows"]
    held = int(warning.split()[3].replace(",", ""))
    assert int(0.001 * rows) < held <= rows
    assert not train(tiny_runs, train__mode="cached", train__cache_ratio=1.0).counts("train")["warnings"]


def test_the_same_run_twice_gives_the_same_model(tmp_path: Path, tiny_runs: Path):
    overrides = {"train__mode": "slipstream", "skip__target_drop": 0.3, "train__log_every": 10}
    assert_same_training(train(tiny_runs, **overrides), train(tmp_path, **overrides))


def test_the_seed_of_training_changes_the_model(tiny_runs: Path, fae: RunResult):
    other = train(tiny_runs, train__mode="fae", train__log_every=10, train__seed=1)
    assert other.stages["segregate"].artifact.path == fae.stages["segregate"].artifact.path
    assert not np.array_equal(predictions_of(fae, "test"), predictions_of(other, "test"))


# --- against a plain loop ------------------------------------------------------------------------------------


def plain_forward(tensors: dict[str, Tensor], dense: Tensor, looked_up: Tensor) -> Tensor:
    """DLRM from the tensors of a model file, without its code."""

    def mlp(name: str, values: Tensor, *, relu_last: bool) -> Tensor:
        layers = sorted({key.split(".")[2] for key in tensors if key.startswith(f"dense.{name}.")}, key=int)
        for layer in layers:
            values = linear(values, tensors[f"dense.{name}.{layer}.weight"], tensors[f"dense.{name}.{layer}.bias"])
            values = values.relu() if relu_last or layer != layers[-1] else values
        return values

    bottom = mlp("bottom", dense, relu_last=True)
    vectors = torch.cat([bottom.unsqueeze(1), looked_up], dim=1)
    products = vectors @ vectors.transpose(1, 2)
    pairs = [products[:, i, j] for i in range(vectors.shape[1]) for j in range(i)]
    return mlp("top", torch.cat([bottom, torch.stack(pairs, dim=1)], dim=1), relu_last=False).squeeze(1)


def initial_tensors(result: RunResult) -> dict[str, Tensor]:
    """What training starts from: rows uniform in ±1/sqrt(N), drawn table by table; dense weights as DLRM draws them."""
    config = result.config
    generator = torch.Generator().manual_seed(config.train_seed)
    tensors = {}
    for name, slots in zip(TABLES, slot_maps_of(result), strict=True):
        bound = len(slots) ** -0.5
        tensors[f"tables.{name}"] = torch.empty(len(slots), config.model.embedding_dim).uniform_(
            -bound, bound, generator=generator
        )
    torch.manual_seed(config.train_seed)
    model = config.model.build(num_dense=13, num_columns=26)
    return tensors | {f"dense.{name}": value for name, value in model.state_dict().items()}


def mean_weights(weights: Tensor | None, row_of_sample: Tensor, num_rows: int) -> Tensor:
    """Σw² / Σw over the samples of each row; 1 where there are none. Shape (num_rows,)."""
    if weights is None:
        return torch.ones(num_rows)
    sums, squares = (torch.bincount(row_of_sample, values, minlength=num_rows) for values in (weights, weights**2))
    return torch.where(sums > 0, squares / sums, 1.0).float()


def plain_training(result: RunResult, batches: list[Batch]) -> dict[str, Tensor]:
    """One nn.Embedding per table with dense gradients, and the update rules written out."""
    config = result.config.train
    tensors = {name: value.clone().requires_grad_() for name, value in initial_tensors(result).items()}
    rows_of_slot = torch.empty(sum(map(len, slot_maps_of(result))), dtype=torch.int64)
    for slots in slot_maps_of(result):
        rows_of_slot[torch.from_numpy(slots).long()] = torch.arange(len(slots))
    state = {name: torch.zeros(len(t)) if name[0] == "t" else torch.zeros_like(t) for name, t in tensors.items()}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in tensors.items()}
    averaged: list[dict[str, Tensor]] = []
    last_plain = len(batches) - (result.counts("train").get("averaged_steps") or 0)
    for step, batch in enumerate(batches, start=1):
        rows = rows_of_slot[torch.from_numpy(batch.slots).long()]
        looked_up = torch.stack([tensors[f"tables.{name}"][rows[:, at]] for at, name in enumerate(TABLES)], dim=1)
        logits = plain_forward(tensors, torch.from_numpy(batch.dense), looked_up)
        weights = None if batch.weights is None else torch.from_numpy(batch.weights)
        losses = binary_cross_entropy_with_logits(
            logits, torch.from_numpy(batch.labels), weight=weights, reduction="none"
        )
        loss = sum(losses) / config.batch_size  # however few samples the batch has
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        with torch.no_grad():
            for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
                if config.optimizer == "sgd":
                    tensor -= config.lr * gradient
                elif config.optimizer == "adam":
                    _move_by_adam(config, name, tensor, gradient, moments[name], weights, rows, step)
                elif name.startswith("tables."):
                    looked_up_rows = rows[:, TABLES.index(name.removeprefix("tables."))]
                    state[name] += (gradient**2).mean(dim=1) / mean_weights(weights, looked_up_rows, len(tensor))
                    tensor -= config.lr * gradient / (state[name].sqrt() + config.eps).unsqueeze(1)
                else:
                    state[name] += gradient**2 / mean_weights(weights, torch.zeros(len(rows), dtype=torch.int64), 1)
                    tensor -= config.lr * gradient / (state[name].sqrt() + config.eps)
        if step > last_plain:
            averaged.append({name: tensor.detach().double() for name, tensor in tensors.items()})
    if averaged:
        return {name: torch.stack([one[name] for one in averaged]).mean(dim=0).float() for name in tensors}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _move_by_adam(
    config: Any,
    name: str,
    tensor: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    weights: Tensor | None,
    rows: Tensor,
    step: int,
) -> None:
    """Adam on the rows that are looked up, and on whole layers; a sample of weight m counts m squares."""
    if name.startswith("tables."):
        looked_up_rows = rows[:, TABLES.index(name.removeprefix("tables."))]
        m = mean_weights(weights, looked_up_rows, len(tensor)).unsqueeze(1)
        moves = torch.bincount(looked_up_rows, minlength=len(tensor)).bool().unsqueeze(1)
    else:
        m = mean_weights(weights, torch.zeros(len(rows), dtype=torch.int64), 1)
        moves = torch.tensor(True)
    first, second = moments
    first.copy_(torch.where(moves, 0.9 * first + 0.1 * gradient, first))
    second.copy_(torch.where(moves, 0.999 * second + 0.001 * gradient**2 / m, second))
    rate = config.lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
    tensor -= torch.where(moves, rate * first / (second.sqrt() + config.eps), 0.0)


@pytest.fixture
def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that goes into the look-ahead, in order."""
    seen: list[Batch] = []
    run = LookAhead.run

    def spy(self: LookAhead, batches: Iterator[Batch], step: Callable[..., None], **options: Any) -> None:
        batches = list(batches)  # type: ignore[assignment]
        seen.extend(batches)
        run(self, iter(batches), step, **options)

    monkeypatch.setattr(LookAhead, "run", spy)
    return seen


@pytest.mark.parametrize(
    ("optimizer", "lr", "order", "average"),
    [
        ("sgd", 0.05, "interleaved", 0.0),
        ("rowwise_adagrad", 0.02, "interleaved", 0.0),
        ("rowwise_adagrad", 0.02, "mixed", 0.0),
        ("adam", 0.003, "interleaved", 0.0),
        ("rowwise_adagrad", 0.02, "interleaved", 0.3),
        ("sgd", 0.05, "mixed", 1.0),
    ],
)
def test_training_equals_a_plain_loop_over_the_same_batches(
    tiny_runs: Path, seen_batches: list[Batch], optimizer: str, lr: float, order: str, average: float
):
    options = {"train__optimizer": optimizer, "train__lr": lr, "train__order": order, "train__average": average}
    result = train(tiny_runs, train__mode="fae", train__log_every=7, **options)
    assert min(map(len, seen_batches)) < result.config.train.batch_size
    assert result.counts("train").get("averaged_steps", 0) == pytest.approx(average * len(seen_batches), abs=2)
    expected = plain_training(result, seen_batches)
    for name, tensor in model_of(result).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("optimizer", "lr", "keep_steps"),
    [("rowwise_adagrad", 0.02, False), ("adam", 0.003, False), ("sgd", 0.05, True)],
)
def test_a_sample_of_weight_w_counts_as_w_samples(
    tiny_runs: Path, seen_batches: list[Batch], optimizer: str, lr: float, keep_steps: bool
):
    result = train(
        tiny_runs,
        train__mode="slipstream",
        train__optimizer=optimizer,
        train__lr=lr,
        train__batch_size=32,
        segregate__hot_budget="50%",
        skip__criterion="negative",
        skip__target_drop=0.5,
        skip__keep_steps=keep_steps,
    )
    assert (Counter(map(len, seen_batches))[16] > 3) == keep_steps
    assert sum(batch.weights is not None and len(np.unique(batch.weights)) > 1 for batch in seen_batches) > 3
    expected = plain_training(result, seen_batches)
    for name, tensor in model_of(result).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_an_epoch_trains_on_every_sample_once(tmp_path: Path, seen_batches: list[Batch]):
    result = train(tmp_path, train__mode="fae", train__epochs=2)
    trained = Counter(sample.tobytes() for batch in seen_batches for sample in np.hstack([batch.dense, batch.slots]))
    given: Counter[bytes] = Counter()
    for group in ("hot", "cold"):
        samples = samples_of(result, group)
        given.update(sample.tobytes() for sample in np.hstack([samples.X_int, samples.X_cat]))
    assert trained == given + given
    counts = result.counts("train")
    assert counts["samples_seen"] == trained.total() == 2 * result.counts("preprocess")["samples"]["train"]
    spent = [counts[f"{what}_seconds"] for what in ("input", "move", "compute")]
    assert min(spent) >= 0 and sum(spent) <= counts["train_seconds"], "parts of the time it took"
    assert counts["steps"] == len(seen_batches)
    assert counts["hot_steps"] == sum(batch.is_hot for batch in seen_batches)
    first, second = seen_batches[: len(seen_batches) // 2], seen_batches[len(seen_batches) // 2 :]
    assert first[0].dense.tolist() != second[0].dense.tolist()


# --- what it leaves behind -----------------------------------------------------------------------------------


def test_predictions_come_back_from_the_model_file_alone(fae: RunResult):
    tensors = model_of(fae)
    for split in ("val", "test"):
        parts = fae.stages["preprocess"].artifact.files(f"{split}/", ".parquet")
        import polars as pl

        frame = pl.concat(map(pl.read_parquet, parts))
        dense = torch.from_numpy(frame.select([f"int_{index}" for index in range(13)]).to_numpy().astype(np.float32))
        looked_up = torch.stack(
            [tensors[f"tables.{name}"][torch.from_numpy(frame[name].to_numpy().copy()).long()] for name in TABLES],
            dim=1,
        )
        probabilities = plain_forward(tensors, dense, looked_up).sigmoid().numpy()
        np.testing.assert_allclose(predictions_of(fae, split), probabilities, rtol=1e-5, atol=1e-6)


def test_the_model_file_describes_its_tables(fae: RunResult):
    description = json.loads((artifact_of(fae).path / "model.json").read_text())
    assert description["tables"] == fae.counts("preprocess")["rows_per_table"]
    assert description["embedding_dim"] == 4
    tensors = model_of(fae)
    for name, num_rows in description["tables"].items():
        assert tuple(tensors[f"tables.{name}"].shape) == (num_rows, 4)


def test_metrics_equal_scikit_learn_on_the_saved_predictions(fae: RunResult):
    for split in ("val", "test"):
        labels, predicted = samples_of(fae, split).y, predictions_of(fae, split).astype(np.float64)
        quality = fae.counts("train")[split]
        assert quality["auc"] == pytest.approx(roc_auc_score(labels, predicted), abs=1e-12)
        assert quality["logloss"] == pytest.approx(log_loss(labels, predicted), rel=1e-9)
        assert quality["accuracy"] == accuracy_score(labels, predicted >= 0.5)
        assert quality["calibration"] == pytest.approx(predicted.mean() / labels.mean())
        base = log_loss(labels, np.full(len(labels), labels.mean(dtype=np.float64)))
        assert quality["ne"] == pytest.approx(quality["logloss"] / base)


def test_the_model_learns(tiny_runs: Path):
    learned = train(tiny_runs, train__mode="fae", train__epochs=3)
    losses = losses_of(learned)
    assert np.mean(losses[-2:]) < losses[0]
    assert learned.counts("train")["test"]["auc"] > 0.6


def test_bytes_per_tier_are_those_of_the_placement(tiny_runs: Path, fae: RunResult):
    rows, hot = fae.counts("segregate")["rows"], fae.counts("segregate")["hot_rows"]
    per_row = 4 * 4 + 4
    tiers = fae.counts("train")["bytes_per_tier"]
    assert (tiers["hot"], tiers["cold"]) == (hot * per_row, (rows - hot) * per_row)
    resident = train(tiny_runs, train__mode="resident", train__log_every=10).counts("train")
    assert (resident["bytes_per_tier"]["hot"], resident["bytes_per_tier"]["cold"]) == (rows * per_row, 0)
    assert resident["bytes_to_device"] == resident["bytes_to_host"] == 0
    baseline = train(tiny_runs, train__mode="baseline", train__log_every=10).counts("train")
    assert baseline["bytes_per_tier"]["hot"] == 0
    assert baseline["bytes_to_device"] > fae.counts("train")["bytes_to_device"] > 0
    assert fae.counts("train")["hit_ratio"] == pytest.approx(fae.counts("segregate")["hit_ratio"])


@pytest.mark.parametrize(
    ("criterion", "held"),
    [("stale", "dense"), ("random", "mixed"), ("negative", "dense"), ("importance", "mixed")],
)
def test_samples_seen_and_dropped_add_up(tiny_runs: Path, criterion: str, held: str):
    result = train(
        tiny_runs,
        train__mode="slipstream",
        skip__criterion=criterion,
        skip__target_drop=0.4,
        skip__refresh_steps=15,
        segregate__hot_budget="50%",
        train__batch_size=32,
        tables=HELD[held],
    )
    counts = result.counts("train")
    assert counts["samples_dropped"] > 0
    assert counts["samples_seen"] + counts["samples_dropped"] == result.counts("preprocess")["samples"]["train"]
    assert counts["drop_asked"] == 0.4
    assert counts["samples_per_second"] == pytest.approx(counts["samples_seen"] / counts["train_seconds"])


@pytest.mark.parametrize("warmup", [0, 5])
def test_rows_are_watched_from_the_end_of_the_warm_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int):
    steps = 0
    opened_at: list[int] = []
    train_batch, make_tracker = loop.Trainer._train_batch, PulledStale.make_tracker

    def count_step(self: loop.Trainer, *batch: Any) -> None:
        nonlocal steps
        steps += 1
        train_batch(self, *batch)

    def watch(*place: Any, **options: Any) -> RowTracker:
        tracker = make_tracker(*place, **options)
        open_window = tracker.open_window

        def note_step() -> None:
            opened_at.append(steps)
            open_window()

        monkeypatch.setattr(tracker, "open_window", note_step)
        return tracker

    monkeypatch.setattr(loop.Trainer, "_train_batch", count_step)
    monkeypatch.setattr(PulledStale, "make_tracker", watch)
    train(tmp_path, train__mode="slipstream", skip__warmup_steps=warmup, skip__refresh_steps=8)
    assert opened_at[0] == warmup
    assert len(opened_at) > 3


# --- before it begins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(("steps", "minutes", "copies"), [(0, 5.0, 3), (9, 0.0, 3), (0, 0.0, 1)])
def test_what_is_asked_for_follows_from_tables_samples_and_checkpoints(
    tmp_path: Path, steps: int, minutes: float, copies: int, on_host: bool, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    monkeypatch.setattr(train_stage, "require_memory", lambda need, **_: asked.append(need))
    monkeypatch.setattr(train_stage, "require_disk", lambda folder, need, **_: asked.append(need))
    config = tiny_config(
        train__optimizer="adam", train__checkpoint_steps=steps, train__checkpoint_minutes=minutes, train__mode="fae"
    )
    figures: Any = SimpleNamespace(hot_rows=100, num_train=3000, num_dense=13, column_tables=[0, 1, 1])
    specs: Any = [
        SimpleNamespace(num_rows=700, num_held=held, representation=kind)
        for kind, held in (("dense", 700), ("int8", 700), ("tt", 0))
    ]
    train_stage._check_capacity(config, figures, specs, tmp_path, on_host=on_host)
    row_bytes = 3 * 4 * 4  # 4 numbers and two moments of each, in fp32
    on_device = 0 if on_host else 100 * row_bytes
    samples = 2 * 3000 * 4 * (3 + 13 + 1)  # those of a window and of a round; columns, numbers, label
    assert asked == [1400 * row_bytes - on_device + samples, copies * 1400 * row_bytes]
