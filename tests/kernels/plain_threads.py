"""Drivers whose threads share work by tickets, as plain Python in several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from wse_kernels._jit import plain
from wse_kernels.threads import HELP, LEAVE, STAY
from wse_kernels.tickets import take_ticket


def in_turns(monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: Callable[..., None], n_threads: int) -> Callable[..., None]:
    """What to put in the place of the driver of `function` in `module`: the caller leaves, comes back, and has all helpers beside it."""
    lock, body = threading.Lock(), plain(function)

    def one_at_a_time(tickets: Any) -> int:
        with lock:
            number = take_ticket(tickets)
        if threading.current_thread() in helpers:
            time.sleep(0.002)  # with a piece in hand: whoever does not wait for it is gone by then
        return number

    monkeypatch.setattr(module, "take_ticket", one_at_a_time)
    errors: list[BaseException] = []
    helpers: list[threading.Thread] = []

    def take_part(role: int, *args: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                body(role, n_threads, *args)
        except BaseException as error:
            errors.append(error)
            raise

    def driver(units: int, *args: Any) -> None:
        progress = np.zeros(2, np.int64)
        helpers[:] = [threading.Thread(target=take_part, args=(HELP, progress, *args)) for _ in range(n_threads - 1)]
        for helper in helpers:
            helper.start()
        take_part(LEAVE, progress, *args)
        take_part(STAY, progress, *args)
        assert progress[0] == progress[1]  # the caller may look at the result, whatever helpers do yet
        for helper in helpers:
            helper.join()
        assert errors == []

    return driver
