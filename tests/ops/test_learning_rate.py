"""The learning rate over the course of training."""

from __future__ import annotations

from slipstream.ops.learning_rate import learning_rate


def test_the_learning_rate_rises_from_zero_and_falls_to_zero_where_asked():
    def rates(warmup: float, decay: str) -> list[float]:
        return [learning_rate(share, lr=0.5, warmup=warmup, decay=decay) for share in (0.0, 0.125, 0.25, 0.5, 1.0)]

    assert rates(0.0, "none") == [0.5] * 5
    assert rates(0.25, "none") == [0.0, 0.25, 0.5, 0.5, 0.5]
    assert rates(0.0, "linear") == [0.5, 0.4375, 0.375, 0.25, 0.0]
    assert rates(0.25, "linear") == [0.0, 0.21875, 0.375, 0.25, 0.0]
