"""The list of stages, and what the result of each depends on.

    generate -> preprocess -> profile -> segregate -> train        (generate only for source `synthetic`)

A key in a stage's settings that no pipeline file has tells results of another version of the code apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from slipstream.config import PipelineConfig
from slipstream.errors import ArtifactError, ConfigError
from slipstream.options import to_dict
from slipstream.progress import Progress
from slipstream.published import SKIP_KEYS as PUBLISHED_KEYS
from slipstream.stage import Stage, row_bytes_of
from slipstream.training.skipping.registry import CRITERIA


def _is_synthetic(config: PipelineConfig) -> bool:
    return config.dataset.source == "synthetic"


def _generate_settings(config: PipelineConfig) -> dict[str, Any]:
    return {"num_samples": config.dataset.num_samples, "num_days": config.dataset.num_days}


def _preprocess_settings(config: PipelineConfig) -> dict[str, Any]:
    dataset = config.dataset
    settings = to_dict(config.preprocess, execution=False)
    if not config.preprocess.target_features:
        settings.pop("target_prior", None)
    settings |= {"source": dataset.source, "max_ind_range": dataset.max_ind_range}
    if dataset.source == "taobao":
        settings |= {"history_length": dataset.history_length, "points_per_user": dataset.points_per_user}
        settings |= {"users_brought_together": True}
    if dataset.source == "table":
        settings |= {"layout": dataset.layout.to_json()}
    if dataset.negative_keep_ratio < 1:
        settings |= {"negative_keep_ratio": dataset.negative_keep_ratio}
    return settings


def _preprocess_seed(config: PipelineConfig) -> int:
    dataset = config.dataset
    draws = config.preprocess.split == "random" or dataset.source == "taobao" or dataset.negative_keep_ratio < 1
    return config.seed if draws else 0


def _raw_inputs(config: PipelineConfig, progress: Progress) -> dict[str, str]:
    if _is_synthetic(config):
        return {}
    from slipstream.io.raw import bytes_to_hash, find_raw_files, fingerprint_raw

    files = find_raw_files(config.dataset.raw)
    with progress.task("hash raw files", sum(map(bytes_to_hash, files)), "B") as advance:
        digests = [fingerprint_raw(path, on_read=lambda count: advance(count, "")) for path in files]
    return {"raw": xxhash.xxh3_64_hexdigest(" ".join(digests).encode())}


def _profile_settings(config: PipelineConfig) -> dict[str, Any]:
    segregate = config.segregate
    settings = to_dict(config.profile, execution=False) | {
        "sample_aware_power": segregate.sample_aware_power,
        "sample_aware_rounds": segregate.sample_aware_rounds,
    }
    if config.dataset.source == "taobao":
        settings["counts_padding"] = False  # it did once
    return settings


def _segregate_settings(config: PipelineConfig) -> dict[str, Any]:
    settings = to_dict(config.segregate, execution=False)
    if not str(config.segregate.hot_budget).strip().endswith("%"):
        # a share of all rows is the same rows whatever a row weighs
        settings["row_bytes"] = row_bytes_of(config)
    return settings


def _start_inputs(config: PipelineConfig, progress: Progress) -> dict[str, str]:
    """Name the model that training starts from by the hashes of its files, wherever it lies."""
    if not config.train.init_from:
        return {}
    from slipstream.io.artifacts import open_artifact

    hint = "name the folder of a train artifact, such as runs/tiny/train/<fingerprint>"
    try:
        artifact = open_artifact(Path(config.train.init_from))
    except ArtifactError as exc:
        raise ConfigError(f"`train.init_from`: {exc}", hint=hint) from exc
    if (stage := artifact.manifest["stage"]) != "train":
        raise ConfigError(f"`train.init_from` = '{artifact.path}' is of stage {stage}, expected train", hint=hint)
    outputs = artifact.manifest["outputs"]
    hashes = [f"{name} {outputs[name]['xxh3']}" for name in sorted(outputs) if name.startswith(("model.", "vocab/"))]
    return {"init_from": xxhash.xxh3_64_hexdigest("\n".join(hashes).encode())}


def _train_settings(config: PipelineConfig) -> dict[str, Any]:
    skip = to_dict(config.skip, execution=False)
    train = to_dict(config.train, execution=False) | {"seed": config.train_seed}
    if not config.train.faithful:
        skip = {name: value for name, value in skip.items() if name not in PUBLISHED_KEYS}
        train["loss_divisor"] = "batch_size"  # it was the mean over each batch once
    if CRITERIA.get(config.criterion).drops:
        skip |= {"movement": config.skip_rule.movement, "floor": config.skip_rule.floor}
        if config.skip_rule.movement == "net" and config.skip.alpha < 1:
            skip["counts_padding"] = False  # it did once
    else:
        skip = {"refresh_steps": config.skip.refresh_steps}
    train.pop("init_from", None)  # an input: what lies there counts, not where
    if config.validates:
        train["kept"] = "best"  # it was the last once
    if config.train.mode != "cached":
        train = {name: value for name, value in train.items() if not name.startswith("cache_")}
    settings = {
        "train": train,
        "model": to_dict(config.model, execution=False),
        "skip": skip | {"criterion": config.criterion},
    }
    if not config.tables.is_plain:
        settings["tables"] = to_dict(config.tables, execution=False)
    if not config.distributed.is_plain:
        settings["distributed"] = to_dict(config.distributed, execution=False)
    return settings


STAGES = (
    Stage(name="generate", comes_with="preprocess", is_part=_is_synthetic, settings=_generate_settings),
    Stage(
        name="preprocess",
        summary="Turn raw logs into encoded columns, one row number per value.",
        after=("generate",),
        other_inputs=_raw_inputs,
        settings=_preprocess_settings,
        seed=_preprocess_seed,
    ),
    Stage(
        name="profile",
        summary="Count accesses per row and measure what each budget would buy.",
        after=("preprocess",),
        comes_with="segregate",
        settings=_profile_settings,
        seed=lambda config: config.seed if config.profile.sample_ratio < 1 else 0,
    ),
    Stage(
        name="segregate",
        summary="Choose the hot rows and split samples by them; profiles first when needed.",
        after=("preprocess", "profile"),
        settings=_segregate_settings,
        seed=lambda config: 0,
    ),
    Stage(
        name="train",
        summary="Train with hot rows on the device and cold rows on the host.",
        after=("segregate",),
        on_all_ranks=True,
        other_inputs=_start_inputs,
        settings=_train_settings,
        seed=lambda config: config.train_seed,
    ),
)
"""In order. What a stage does stands in its module; see `stage.py`."""
