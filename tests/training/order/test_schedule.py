"""How an epoch is cut."""

from hypothesis import given
from hypothesis import strategies as st

from slipstream.training.order.schedule import default_segment_steps


@given(st.integers(1, 10**6), st.integers(1, 5000))
def test_an_epoch_has_at_most_seven_segments_by_default(num_samples: int, batch_size: int):
    steps = default_segment_steps(num_samples, batch_size)
    assert steps >= 1
    assert steps * batch_size * 7 >= num_samples
