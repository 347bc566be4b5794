"""What looks wrong in the figures of a stage though nothing failed, in plain words.

Each function returns warnings, none where all is well; they go to the manifest, the report and `--json`.
"""

from __future__ import annotations

from collections.abc import Mapping

_LEAST_YIELD = 0.01
"""Samples over lines; a log of sequences has usually a fifth."""
_MOST_HELD_OUT, _LEAST_HELD_OUT = 0.3, 0.01
"""Shares of all samples; `chronological` holds out a seventh, one day of Criteo Terabyte is a twenty-fourth."""


def doubt_yield(*, accepted: int, samples: int) -> list[str]:
    """Warn when hardly any sample comes of the accepted lines."""
    if samples >= _LEAST_YIELD * accepted:
        return []
    return [
        f"only {samples:,} samples came of {accepted:,} lines: check that `dataset.source` is what wrote them, and "
        "that a sample's lines bear the same user"
    ]


def doubt_split(rule: str, samples: Mapping[str, int], *, left_out: int = 0) -> list[str]:
    """Warn when far more or far less is held out for test and validation than a seventh.

    Args:
        rule: `preprocess.split`.
        samples: Samples of each split.
        left_out: Training samples left out on purpose.
    """
    held_out, total = samples["val"] + samples["test"], sum(samples.values()) + left_out
    share = held_out / max(total, 1)
    if share > _MOST_HELD_OUT:
        what, why = f"{share:.0%} of all samples are held out", "little is left to train on"
    elif share < _LEAST_HELD_OUT:
        what, why = f"only {share:.2%} of all samples are held out", "test figures rest on few samples"
    else:
        return []
    return [
        f"{what} ({samples['train']:,} train, {samples['val']:,} val, {samples['test']:,} test): {why}; check the days "
        f"and the order of the raw files, or choose another `preprocess.split` than {rule}"
    ]


def doubt_classes(samples: Mapping[str, int], positives: Mapping[str, int]) -> list[str]:
    """Warn of each split in which one class is missing, so that its AUC has no meaning."""
    return [
        f"every label of split {split} is {int(positives[split] > 0)}: its AUC and NE are undefined"
        for split, count in samples.items()
        if positives[split] in (0, count)
    ]


def doubt_quality(normalised_entropy: Mapping[str, float]) -> list[str]:
    """Warn of each split that the model predicts worse than its mean click rate would.

    Args:
        normalised_entropy: NE of each split; NaN where it is undefined.
    """
    return [
        f"NE of split {split} is {ne:.3f}, above 1: the model predicts worse than the mean click rate alone would; try "
        "a lower `train.lr`, a warm-up (`train.lr_warmup`) or more samples"
        for split, ne in normalised_entropy.items()
        if ne > 1
    ]
