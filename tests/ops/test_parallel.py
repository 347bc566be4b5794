from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.ops.parallel import in_order


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_results_come_in_the_order_of_tasks(delays: list[int], workers: int):
    def work(task: tuple[int, int]) -> int:
        time.sleep(task[1] / 2000)
        return task[0]

    assert list(in_order(work, enumerate(delays), workers)) == list(range(len(delays)))


def test_no_more_than_one_task_per_worker_is_taken_ahead_of_the_reader():
    taken = 0

    def tasks():
        nonlocal taken
        for task in range(20):
            taken += 1
            yield task

    results = in_order(lambda task: task, tasks(), workers=2)
    for read in range(1, 6):
        next(results)
        assert taken <= read + 2
    results.close()


def test_an_error_stops_the_work():
    done: list[int] = []
    lock = threading.Lock()

    def work(task: int) -> int:
        if task == 1:
            raise ValueError("task 1")
        with lock:
            done.append(task)
        return task

    with pytest.raises(ValueError, match="task 1"):
        list(in_order(work, range(1000), workers=2))
    assert len(done) < 20
