"""Tickets: every number once, in order, also when threads take them at the same moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.tickets import new_tickets, take_ticket, tickets_taken

N = 200_000


@kernel(driver=True, cache=False)
def take_many(tickets: NDArray[np.int64], mine: NDArray[np.int64]) -> None:
    for i in range(mine.shape[0]):
        mine[i] = take_ticket(tickets)


@pytest.mark.nojit
def test_one_thread_gets_them_in_order() -> None:
    mine = np.empty(5, np.int64)
    tickets = new_tickets()
    take_many(tickets, mine)
    assert mine.tolist() == [0, 1, 2, 3, 4]
    assert take_ticket(tickets) == 5


def test_no_number_is_given_twice() -> None:
    tickets, start = new_tickets(), Barrier(2)
    take_many(new_tickets(), np.empty(1, np.int64))  # compiled before they start

    def take() -> NDArray[np.int64]:
        mine = np.empty(N, np.int64)
        start.wait()
        take_many(tickets, mine)
        return mine

    with ThreadPoolExecutor(2) as threads:
        first, second = (t.result() for t in [threads.submit(take), threads.submit(take)])
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(2 * N))


def test_what_was_written_before_a_ticket_is_seen_behind_it() -> None:
    @kernel(driver=True, cache=False)
    def write(values: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        for i in range(values.shape[0]):
            values[i] = i + 1
            take_ticket(done)

    @kernel(driver=True, cache=False)
    def read(values: NDArray[np.int64], done: NDArray[np.int64]) -> int:
        wrong = 0
        for i in range(values.shape[0]):
            while tickets_taken(done) <= i:
                pass
            wrong += values[i] != i + 1
        return wrong

    write(np.zeros(1, np.int64), new_tickets())
    assert read(np.ones(1, np.int64), np.ones(1, np.int64)) == 0  # both are compiled
    values, done = np.zeros(N, np.int64), new_tickets()
    with ThreadPoolExecutor(2) as threads:
        reader, writer = threads.submit(read, values, done), threads.submit(write, values, done)
        writer.result()
        assert reader.result() == 0
    assert tickets_taken(done) == N
