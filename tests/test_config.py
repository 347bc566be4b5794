from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import tiny_config, tiny_tree, write_toml

from slipstream.config import PipelineConfig, build_pipeline, load_pipeline
from slipstream.errors import ConfigError
from slipstream.models.dlrm import DLRM
from slipstream.options import parse_budget, parse_bytes, to_dict
from slipstream.pipeline import plan_pipeline

# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" 2 TiB ", 2 * 2**40),
        ("1kb", 1000),
        ("0.5KiB", 512),
        ("7B", 7),
    ],
)
def test_sizes_are_read_in_every_unit(text: str | int, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", -1, "1e6", "1,5GB", "64XB", "1 2", True, "0x10", "٣"])
def test_what_is_no_size_is_refused(text: Any):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("1%", 10), (" 0.55 % ", 5), ("100%", 1000), ("64", 64), (64, 64), ("1KiB", 1024)]
)
def test_budgets_are_sizes_or_shares(text: str | int, expected: int):
    assert parse_budget(text, total_bytes=1000) == expected


@pytest.mark.parametrize("text", ["0%", "-1%", "100.1%", "nan%", "inf%", "%", "ten%", "0", 0, "0MiB", "lots"])
def test_what_is_no_budget_is_refused(text: str | int):
    with pytest.raises(ValueError, match="expected a"):
        parse_budget(text, total_bytes=1000)


@given(st.integers(0, 2**46))
def test_a_whole_budget_is_every_byte(total: int):
    assert parse_budget("100%", total_bytes=total) == total


# --- the closed schema ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "suggestion"),
    [
        ("profil", {}, "did you mean `profile`?"),
        ("train__epoch", 2, "did you mean `train.epochs`?"),
        ("skip__tresh", 0.1, "did you mean `skip.threshold`?"),
        ("train__qqqq", 2, "known keys: mode,"),
        ("model__botom_mlp", [4], "did you mean `model.bottom_mlp`?"),
        ("preprocess__tables", {"cat_2": {"max_row": 3}}, "did you mean `preprocess.tables.cat_2.max_rows`?"),
    ],
)
def test_an_unknown_key_teaches_the_schema(key: str, value: Any, suggestion: str):
    with pytest.raises(ConfigError, match="unknown key") as caught:
        tiny_config(**{key: value})
    assert suggestion in str(caught.value.hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train__epochs", True, "`train.epochs` must be int, found bool: True"),
        ("train__epochs", "2", "`train.epochs` must be int, found str: '2'"),
        ("train__epochs", 2.0, "`train.epochs` must be int, found float: 2.0"),
        ("train__lr", True, "`train.lr` must be float, found bool"),
        ("train__lr", "0.1", "`train.lr` must be float, found str"),
        ("train__mode", "faee", "`train.mode` must be one of resident, baseline, fae"),
        ("train__mode", True, "`train.mode` must be one of"),
        ("train__optimizer", ["sgd"], "`train.optimizer` must be one of"),
        ("skip__threshold", "low", "`skip.threshold` must be float, found str"),
        ("skip__reweight", 1, "`skip.reweight` must be bool, found int"),
        ("segregate__hot_budget", 1.5, "`segregate.hot_budget` must be str or int, found float"),
        ("model__bottom_mlp", ["8", 4], "`model.bottom_mlp[0]` must be int, found str"),
        ("profile__curve", {"a": 1}, "`profile.curve[0]` must be float, found dict"),
        ("train", 3, "`train` must be a section, found 3"),
        ("preprocess__tables", 3, "`preprocess.tables` must be a section, found 3"),
        ("seed", False, "`seed` must be int, found bool"),
        ("name", 7, "`name` must be str, found int"),
    ],
)
def test_a_wrong_type_is_named_with_its_key(key: str, value: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        tiny_config(**{key: value})
    assert str(caught.value).startswith(message)


def test_a_key_of_another_model_names_its_owner():
    with pytest.raises(ConfigError, match=r"belongs to tbsm, found `model\.name` = 'dlrm'") as caught:
        tiny_config(model__step_mlp=[7, 7])
    assert "leave it out" in str(caught.value.hint)


@pytest.mark.parametrize("section", [3, ["dlrm"]])
def test_a_model_is_a_section(section: Any):
    with pytest.raises(ConfigError, match="`model` must be a section"):
        tiny_config(model=section)


def test_a_section_without_a_name_is_dlrm():
    assert tiny_config(model={}).model == DLRM()
    assert build_pipeline({"name": "x", "dataset": {"source": "synthetic"}}).model == DLRM()


def test_a_misspelt_choice_is_corrected():
    with pytest.raises(ConfigError) as caught:
        tiny_config(train__mode="slipsteam")
    assert caught.value.hint == "did you mean `slipstream`?"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a/b"),
        ("name", ".hidden"),
        ("name", ""),
        ("seed", -1),
        ("seed", 2**32),
        ("dataset__num_samples", 99),
        ("dataset__num_days", 0),
        ("dataset__max_ind_range", -1),
        ("preprocess__freq_threshold", 0),
        ("preprocess__max_rows", -1),
        ("preprocess__num_buckets", -1),
        ("preprocess__max_reject_ratio", 1.1),
        ("preprocess__samples_per_part", 0),
        ("preprocess__num_threads", -1),
        ("preprocess__chunk_bytes", "1B"),
        ("preprocess__chunk_bytes", "plenty"),
        ("profile__sample_ratio", 0),
        ("profile__sample_ratio", 1.01),
        ("profile__curve", []),
        ("profile__curve", [0.1, 0]),
        ("segregate__hot_budget", "0%"),
        ("segregate__hot_budget", 0),
        ("segregate__hot_budget", "much"),
        ("segregate__access_threshold", -1),
        ("segregate__sample_aware_power", 0),
        ("segregate__sample_aware_rounds", 0),
        ("segregate__samples_per_shard", 0),
        ("model__embedding_dim", 0),
        ("model__bottom_mlp", []),
        ("model__bottom_mlp", [8, 5]),
        ("model__top_mlp", [8, 2]),
        ("model__top_mlp", []),
        ("train__epochs", 0),
        ("train__batch_size", 0),
        ("train__chunk_batches", 0),
        ("train__log_every", 0),
        ("train__eval_batch_size", 0),
        ("train__lr", 0),
        ("train__lr", float("nan")),
        ("train__lr_warmup", 1),
        ("train__eps", 0),
        ("train__weight_decay", -0.1),
        ("train__staging_rows", -1),
        ("train__num_threads", -1),
        ("skip__target_drop", 1),
        ("skip__target_drop", -0.1),
        ("skip__floor", 0),
        ("skip__alpha", 0),
        ("skip__alpha", 1.1),
        ("skip__threshold", -1),
        ("skip__refresh_steps", -1),
        ("skip__window_steps", -1),
        ("skip__warmup_steps", -1),
        ("skip__sample_size", 0),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(key: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        tiny_config(**{key: value})
    assert f"`{key.replace('__', '.')}`" in str(caught.value)


def test_a_width_below_one_is_refused():
    with pytest.raises(ConfigError, match="positive widths"):
        tiny_config(model__top_mlp=[0, 1])


@pytest.mark.parametrize(
    "tree", [{}, {"name": "x"}, {"dataset": {"source": "synthetic"}}, {"name": "x", "dataset": {}}]
)
def test_missing_keys_are_named(tree: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"missing key `(name|dataset|dataset\.source)`"):
        build_pipeline(tree)


def test_a_source_of_files_needs_files():
    with pytest.raises(ConfigError, match=r"`dataset.raw` must name the raw files of source `criteo`"):
        tiny_config(dataset__source="criteo")


def test_limits_of_a_table_fall_back_to_those_of_all():
    config = tiny_config(preprocess__max_rows=50, preprocess__tables={"cat_2": {"freq_threshold": 9}})
    own, other = config.preprocess.limits_of("cat_2"), config.preprocess.limits_of("cat_3")
    assert (own.freq_threshold, own.max_rows, own.num_buckets) == (9, 50, 0)
    assert (other.freq_threshold, other.max_rows, other.num_buckets) == (2, 50, 0)


# --- files and overrides -------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "pipeline.toml", tiny_tree())


def test_a_file_and_its_tree_are_the_same_pipeline(pipeline_file: Path):
    assert load_pipeline(pipeline_file) == tiny_config()


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.lr=0.5", "train.lr", 0.5),
        ("train.lr=1", "train.lr", 1.0),
        ("train.mode=fae", "train.mode", "fae"),
        ('train.mode="fae"', "train.mode", "fae"),
        ("segregate.hot_budget=3%", "segregate.hot_budget", "3%"),
        ("segregate.hot_budget=64MiB", "segregate.hot_budget", "64MiB"),
        ("segregate.hot_budget=4096", "segregate.hot_budget", 4096),
        ("dataset.raw=/data/day_*.gz", "dataset.raw", ("/data/day_*.gz",)),
        ('dataset.raw=["a", "b=c"]', "dataset.raw", ("a", "b=c")),
        ("profile.curve=[0.1, 1]", "profile.curve", (0.1, 1.0)),
        ("skip.reweight=false", "skip.reweight", False),
        ("skip.threshold=1e-3", "skip.threshold", 0.001),
        (" train.epochs = 3", "train.epochs", 3),
        ("preprocess.tables.cat_1.max_rows=5", "preprocess.tables.cat_1.max_rows", 5),
        ("name=other-run", "name", "other-run"),
    ],
)
def test_overrides_are_toml_values_or_else_strings(pipeline_file: Path, override: str, key: str, expected: Any):
    value: Any = load_pipeline(pipeline_file, [override])
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_override_wins(pipeline_file: Path):
    assert load_pipeline(pipeline_file, ["train.epochs=2", "train.epochs=5"]).train.epochs == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "expected `--set key=value`"),
        ("=3", "expected `--set key=value`"),
        ("train.epoch=3", "unknown key `train.epoch`"),
        ("train.epochs=true", "`train.epochs` must be int"),
        ("train.epochs=many", "`train.epochs` must be int"),
        ("name.x=3", "`name` in `--set name.x=3` is a value, not a section"),
        ("train.epochs.x=3", "`train.epochs` must be int, found dict"),
        ("dataset.source.x=3", "`source` in `--set dataset.source.x=3` is a value"),
        ("train=3", "`train` must be a section"),
    ],
)
def test_overrides_are_checked_like_the_file(pipeline_file: Path, override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_pipeline(pipeline_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected a pipeline file"), (b"name = ", "is not valid TOML"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "p.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_pipeline(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_pipeline_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a pipeline file"):
        load_pipeline(tmp_path)


def test_the_resolved_config_is_plain_and_builds_the_same_pipeline():
    config = tiny_config(preprocess__tables={"cat_1": {"max_rows": 9}})
    plain = json.loads(json.dumps(to_dict(config)))
    without_none = json.loads(json.dumps(plain), object_hook=lambda d: {k: v for k, v in d.items() if v is not None})
    assert build_pipeline(without_none) == config


# --- what a key changes --------------------------------------------------------------------------------------

STAGE_OF_SECTION = {
    "preprocess": "preprocess",
    "profile": "profile",
    "segregate": "segregate",
    "model": "train",
    "tables": "train",
    "train": "train",
    "skip": "train",
}
FIRST_STAGE_OF_KEY = {
    "segregate.sample_aware_power": "profile",  # the curve shows the sample-aware policy too
    "segregate.sample_aware_rounds": "profile",
}
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "preprocess.tables": {"preprocess__tables": {"cat_1": {"max_rows": 3}}},
    "preprocess.count_features": {"preprocess__count_features": ["cat_1"]},
    "preprocess.target_features": {"preprocess__target_features": ["cat_1"]},
    "preprocess.chunk_bytes": {"preprocess__chunk_bytes": "1MiB"},
    "profile.curve": {"profile__curve": [0.3]},
    "segregate.hot_budget": {"segregate__hot_budget": "7%"},
    "model.embedding_dim": {"model__embedding_dim": 8, "model__bottom_mlp": [8, 8]},
    "model.bottom_mlp": {"model__bottom_mlp": [16, 4]},
    "model.top_mlp": {"model__top_mlp": [16, 1]},
    "model.name": {"model": {"name": "tbsm", "embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]}},
    "tables.tt_ranks": {"tables__tt_ranks": [2, 2]},
    "tables.quantize_linears": {"tables__quantize_linears": 8},
    "tables.quantize_biases": {"tables__quantize_linears": 8, "tables__quantize_biases": True},
    "tables.mixed_budget": {"tables__mixed_budget": "9%"},
    "tables.mixed_formats": {"tables__mixed_formats": ["8", "4"]},
    "tables.rules": {"tables__rules": [{"min_rows": 100, "representation": "int8"}]},
    "tables.overrides": {"tables__overrides": {"cat_1": {"representation": "int4"}}},
    "train.seed": {"train__seed": 5},
    "train.faithful": {"train__faithful": True, "train__chunk_batches": 16},
    "train.optimizer": {"train__optimizer": "adam"},
    "train.cold_path": {"train__cold_path": "disk"},
    "skip.criterion": {"skip__criterion": "random"},
    "skip.threshold": {"skip__threshold": 0.01},
    "skip.floor": {"skip__floor": 0.01},
}
"""Values for keys whose other values cannot be guessed from their type."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "preprocess.target_prior": {"preprocess__target_features": ["cat_1"]},
    "train.cache_ratio": {"train__mode": "cached"},
    "train.cache_policy": {"train__mode": "cached"},
    "tables.period": {"tables__representation": "int8"},
    "tables.scale_per": {"tables__representation": "int8"},
    "tables.tt_ranks": {"tables__representation": "tt"},
    "tables.mixed_budget": {"tables__representation": "mixed"},
    "tables.mixed_formats": {"tables__representation": "mixed"},
    "skip.sample_ratio": {"train__faithful": True, "train__chunk_batches": 16},
    "skip.probe_share": {"train__faithful": True, "train__chunk_batches": 16},
    "skip.tolerance": {"train__faithful": True, "train__chunk_batches": 16},
}
"""What must hold for keys that mean nothing otherwise."""
NEEDS: dict[str, dict[str, Any]] = {
    "train.patience": {"train__validate_steps": 5},
    "model.name": {"dataset__source": "taobao", "dataset__raw": [__file__]},  # planning reads no line of it
    "skip.alpha_per": {"skip__movement": "net"},
}
"""What other values of a key need; the key means something without it too."""


def fingerprints(config: PipelineConfig, tmp_path: Path) -> dict[str, str]:
    return {plan.stage: plan.key.fingerprint for plan in plan_pipeline(config, tmp_path)}


def keys_of(section: str) -> list[tuple[str, Any, Any, bool]]:
    cls = type(getattr(tiny_config(), section))
    hints = get_type_hints(cls)
    specs = dataclasses.fields(cls)
    return [
        (f"{section}.{spec.name}", hints[spec.name], spec.default, bool(spec.metadata.get("execution")))
        for spec in specs
    ]


def another_value(key: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        others = [option for option in get_args(hint) if option != value]
        return others[0] if others else None
    if hint is bool:
        return not value
    if hint is int:
        return value + 1
    if hint is float:
        return value / 2 or 0.25
    raise NotImplementedError(f"give {key} a value in OTHER_VALUES")


ELSEWHERE = {"train.init_from"}
"""Keys whose values lie on disk: tests/serving/test_warm_start.py."""
ALL_KEYS = [
    pytest.param(*key, id=key[0]) for section in STAGE_OF_SECTION for key in keys_of(section) if key[0] not in ELSEWHERE
]


FLOAT_KEYS = [pytest.param(*key.values[:2], id=str(key.id)) for key in ALL_KEYS if "float" in str(key.values[1])]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("key", "hint"), FLOAT_KEYS)
def test_what_is_no_finite_number_is_refused(key: str, hint: Any, value: float):
    changed = [value] if get_origin(hint) is tuple else value
    with pytest.raises(ConfigError, match=rf"`{key}(\[0\])?` must be a finite number, found {value}"):
        tiny_config(**{key.replace(".", "__"): changed})


@pytest.mark.parametrize(("key", "hint", "default", "is_execution"), ALL_KEYS)
def test_a_key_changes_its_own_stage_and_none_before_it(
    tmp_path: Path, key: str, hint: Any, default: Any, is_execution: bool
):
    section, name = key.split(".")
    if key in OTHER_VALUES:
        changed = OTHER_VALUES[key]
    else:
        value = another_value(key, hint, getattr(getattr(tiny_config(), section), name))
        if value is None:
            pytest.skip("there is only one value yet")
        changed = {f"{section}__{name}": value}
    base = CONDITIONS.get(key, {}) | NEEDS.get(key, {})
    before, after = fingerprints(tiny_config(**base), tmp_path), fingerprints(tiny_config(**base, **changed), tmp_path)
    stages = list(before)
    first = stages.index(FIRST_STAGE_OF_KEY.get(key, STAGE_OF_SECTION[section]))
    changes = [stage for stage in stages if before[stage] != after[stage]]
    assert changes == ([] if is_execution else stages[first:])


@pytest.mark.parametrize("key", CONDITIONS)
def test_a_key_that_means_nothing_makes_nothing_run_again(tmp_path: Path, key: str):
    changed = OTHER_VALUES.get(key) or {
        key.replace(".", "__"): {"cache_ratio": 0.5, "cache_policy": "lfu", "period": 7, "scale_per": "row"}.get(
            key.split(".")[1], 0.25
        )
    }
    assert fingerprints(tiny_config(), tmp_path) == fingerprints(tiny_config(**changed), tmp_path)


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"seed": 9}, "generate"),
        ({"dataset__num_samples": 5000}, "generate"),
        ({"dataset__num_days": 3}, "generate"),
        ({"dataset__max_ind_range": 10}, "preprocess"),
        ({"name": "elsewhere"}, None),
    ],
)
def test_what_the_rest_changes(tmp_path: Path, changed: dict[str, Any], first: str | None):
    before, after = fingerprints(tiny_config(), tmp_path), fingerprints(tiny_config(**changed), tmp_path)
    stages = list(before)
    changes = [stage for stage in stages if before[stage] != after[stage]]
    assert changes == (stages[stages.index(first) :] if first else [])


def test_skip_keys_do_not_matter_where_nothing_is_skipped(tmp_path: Path):
    before, after = (
        fingerprints(tiny_config(train__mode="fae", skip__target_drop=drop), tmp_path) for drop in (0.1, 0.4)
    )
    assert before == after


def test_a_budget_in_bytes_depends_on_what_a_row_weighs_and_a_share_does_not(tmp_path: Path):
    for budget, changes in (("10%", False), ("64KiB", True)):
        adagrad, sgd = (
            fingerprints(tiny_config(segregate__hot_budget=budget, train__optimizer=optimizer), tmp_path)
            for optimizer in ("rowwise_adagrad", "sgd")
        )
        assert (adagrad["segregate"] != sgd["segregate"]) is changes


def test_triton_is_refused_for_an_optimizer_without_a_kernel():
    with pytest.raises(ConfigError, match=r"`train\.optimizer` = 'adam' has no Triton kernel; sgd and rowwise_adagrad"):
        tiny_config(train__optimizer="adam", train__kernels="triton")


# --- how tables are held -------------------------------------------------------------------------------------


def test_the_largest_rule_that_fits_holds_and_overrides_win():
    tables = tiny_config(
        tables={
            "period": 50,
            "rules": [
                {"min_rows": 1000, "representation": "tt", "tt_ranks": [8, 8]},
                {"min_rows": 10, "representation": "int8", "period": 5},
            ],
            "overrides": {"cat_2": {"representation": "int4"}},
        }
    ).tables
    chosen = {(name, size): tables.choice_for(name, size) for name in ("cat_1", "cat_2") for size in (9, 10, 1000)}
    assert [chosen["cat_1", size].representation for size in (9, 10, 1000)] == ["dense", "int8", "tt"]
    assert [chosen["cat_2", size].representation for size in (9, 10, 1000)] == ["int4"] * 3
    assert [chosen["cat_2", size].period for size in (9, 10, 1000)] == [50, 5, 50]
    assert chosen["cat_1", 1000].tt_ranks == (8, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"tables": {"representation": "in4"}},
            "tables.representation` must be one of dense, int8, int4, int2, mixed, tt",
        ),
        ({"tables": {"rules": [{"representation": "tt"}]}}, "missing key `tables.rules\\[0\\].min_rows`"),
        ({"tables": {"rules": [{"min_rows": 1, "rank": 2}]}}, "unknown key `tables.rules\\[0\\].rank`"),
        ({"tables": {"period": 0}}, "`tables.period` must be at least 1"),
        ({"tables": {"overrides": {"cat_1": {"representation": 4}}}}, "cat_1.representation` must be one of"),
        ({"tables": {"tt_ranks": []}}, "one to three ranks"),
        ({"tables": {"quantize_linears": 3}}, "must be 0, 4 or 8"),
        ({"tables": {"quantize_biases": True}}, "`tables.quantize_linears` = 0 leaves fp32"),
        (
            {"tables": {"representation": "int4"}, "model__embedding_dim": 3, "model__bottom_mlp": [3]},
            "`model.embedding_dim` must make rows of a multiple of 2 values for int4 tables",
        ),
        (
            {
                "tables": {"rules": [{"min_rows": 9, "representation": "mixed"}]},
                "model__embedding_dim": 3,
                "model__bottom_mlp": [3],
            },
            "`model.embedding_dim` must make rows of a multiple of 2 values for mixed tables",
        ),
        ({"tables": {"mixed_formats": ["8", "3"]}}, "`tables.mixed_formats` must be formats such as '8'"),
        ({"tables": {"mixed_formats": ["4/0"]}}, "`tables.mixed_formats` must be formats such as '8'"),
        ({"tables": {"mixed_formats": []}}, "`tables.mixed_formats` must be formats such as '8'"),
        ({"tables": {"mixed_budget": "0%"}}, "`tables.mixed_budget`: expected a share above 0%"),
        (
            {"tables": {"representation": "tt"}, "train__faithful": True, "train__mode": "fae"},
            "`train.faithful` does not go with tt",
        ),
        (
            {"tables": {"representation": "mixed"}, "train__faithful": True, "train__mode": "fae"},
            "`train.faithful` does not go with mixed",
        ),
    ],
)
def test_tables_that_cannot_be_held_so_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(
    "other", [{"mode": "resident"}, {"mode": "fae", "cold_access": "in_place"}, {"mode": "fae", "faithful": True}]
)
def test_what_cannot_have_cold_rows_in_a_file_is_refused_by_name(other: dict[str, Any]):
    key, value = list(other.items())[-1]
    with pytest.raises(ConfigError, match=rf"`train.cold_path` does not go with `train.{key}` = {value!r}"):
        tiny_config(train__cold_path="disk", **{f"train__{name}": value for name, value in other.items()})


def test_batches_cannot_be_smaller_by_a_share_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"`skip.keep_steps` makes batches smaller .* `skip.threshold` by hand"):
        tiny_config(skip__keep_steps=True, skip__threshold=0.1)


def test_alpha_of_each_table_goes_with_net_movement():
    with pytest.raises(ConfigError, match=r"goes with net movement, found `skip.movement` = 'per-label'"):
        tiny_config(skip__alpha_per="table")
    assert tiny_config(skip__alpha_per="table", skip__movement="net")
    assert tiny_config(skip__alpha_per="table", skip__criterion="random")


def test_the_floor_left_out_is_that_of_the_criterion():
    def floor(criterion: str, **overrides: Any) -> float:
        return tiny_config(skip__criterion=criterion, skip__scope="all", **overrides).skip_rule.floor

    assert (floor("importance"), floor("stale"), floor("importance", skip__floor=0.1)) == (0.2, 0.05, 0.1)


def test_a_section_that_says_nothing_keeps_what_is_trained(tmp_path: Path):
    def fingerprint(**overrides: Any) -> str:
        return plan_pipeline(tiny_config(**overrides), tmp_path)[-1].key.fingerprint

    assert fingerprint() == fingerprint(tables={"period": 9, "rules": [{"min_rows": 5, "representation": "dense"}]})
    assert fingerprint() != fingerprint(tables={"representation": "int4"})
    assert fingerprint() != fingerprint(tables={"quantize_linears": 8})
    assert fingerprint(tables={"quantize_linears": 8}) == fingerprint(
        tables={"quantize_linears": 8, "quantize_biases": False}
    )


def test_rules_are_written_as_arrays_of_tables(tmp_path: Path):
    path = tmp_path / "pipeline.toml"
    path.write_text(
        'name = "x"\n[dataset]\nsource = "synthetic"\n[tables]\nrepresentation = "dense"\n'
        '[[tables.rules]]\nmin_rows = 1_000_000\nrepresentation = "tt"\ntt_ranks = [16, 16]\n'
        '[tables.overrides.cat_2]\nrepresentation = "int4"\n'
    )
    tables = load_pipeline(path, ["tables.overrides.cat_3.representation=int8"]).tables
    assert tables.choice_for("cat_0", 10**6).representation == "tt"
    assert tables.choice_for("cat_2", 10**6).representation == "int4"
    assert tables.choice_for("cat_3", 5).representation == "int8"
