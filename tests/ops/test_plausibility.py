from __future__ import annotations

import pytest

from slipstream.ops.plausibility import doubt_classes, doubt_quality, doubt_split, doubt_yield


@pytest.mark.parametrize(
    ("lines", "samples", "is_doubted"),
    [(96_169, 16, True), (96_169, 74_678, False), (1000, 10, False), (1000, 9, True)],
)
def test_hardly_any_samples_of_many_lines_are_doubted(lines: int, samples: int, is_doubted: bool):
    warnings = doubt_yield(accepted=lines, samples=samples)
    assert bool(warnings) == is_doubted
    assert all(f"only {samples:,} samples came of {lines:,} lines" in text for text in warnings)


@pytest.mark.parametrize(
    ("train", "held_out", "left_out", "said"),
    [
        (860, 140, 0, None),
        (330, 670, 0, "67% of all samples are held out"),
        (300, 140, 560, None),
        (9999, 2, 0, "only 0.02% of all samples are held out"),
        (23_000, 1000, 0, None),
    ],
)
def test_a_lopsided_split_is_doubted(train: int, held_out: int, left_out: int, said: str | None):
    samples = {"train": train, "val": held_out // 2, "test": held_out - held_out // 2}
    [*warnings] = doubt_split("by_day", samples, left_out=left_out)
    assert (said is None and not warnings) or (said in warnings[0] and "by_day" in warnings[0])


def test_a_split_of_one_class_is_doubted():
    samples = {"train": 10, "val": 5, "test": 5}
    assert doubt_classes(samples, {"train": 4, "val": 1, "test": 4}) == []
    [all_clicks] = doubt_classes(samples, {"train": 4, "val": 1, "test": 5})
    [no_click] = doubt_classes(samples, {"train": 4, "val": 0, "test": 1})
    assert "every label of split test is 1" in all_clicks and "every label of split val is 0" in no_click


def test_worse_than_the_mean_is_doubted():
    assert doubt_quality({"test": 1.0, "val": float("nan")}) == []
    [warning] = doubt_quality({"test": 1.0301, "val": 0.9})
    assert "NE of split test is 1.030, above 1" in warning
