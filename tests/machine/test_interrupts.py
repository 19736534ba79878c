"""Ctrl-C at any line of a run: nothing stays on the wafer, and model and wafer work on as if nothing had been."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

from .models import make_model

PROMPT, NEW = np.array([5, 9, 2]), 2


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of `wse_emu` is about to run; without n it only counts."""

    def __init__(self, at: int | None = None) -> None:
        self.lines = 0
        self.where = ""
        self._at = at

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_globals.get("__name__", "").startswith("wse_emu.") else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize(("executor", "interrupts"), [("batched", 60), pytest.param("isolated", 12, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_nothing_behind(executor: str, interrupts: int) -> None:
    model = make_model("mixtral", 2, 3, executor)
    wafer = model.wafer
    expected = model.generate(PROMPT, NEW)
    mine = wafer.place(np.arange(12.0, dtype=np.float32).reshape(3, 4))
    before = wafer.sram.used_bytes()
    with Interrupt() as whole:
        model.generate(PROMPT, NEW)
    rng, interrupted = random.Random(0), 0
    for _ in range(interrupts):
        with Interrupt(rng.randint(1, whole.lines)) as interrupt:
            try:
                model.generate(PROMPT, NEW)
            except KeyboardInterrupt:
                interrupted += 1
        assert wafer.sram.live == ("x",), interrupt.where
        assert wafer.sram.used_bytes() == before, interrupt.where
        if wafer.cores is not None:
            held = [b.name for core in np.ndindex(wafer.rows, wafer.cols) for b in wafer.cores.arena(*core).blocks]
            assert set(held) == {"x"}, interrupt.where
    # A run that repeats an undisturbed one takes fewer lines and may end before its interrupt; after an interrupt everything runs whole.
    assert interrupted >= interrupts * 3 // 4
    wafer.ledger.clear()
    np.testing.assert_array_equal(model.generate(PROMPT, NEW), expected)
    np.testing.assert_array_equal(mine.gather(), np.arange(12.0).reshape(3, 4))
    fresh = make_model("mixtral", 2, 3, executor)
    fresh.generate(PROMPT, NEW)
    assert wafer.ledger.events()[: len(fresh.wafer.ledger)] == fresh.wafer.ledger.events()


def test_a_failing_callback_leaves_nothing_behind() -> None:
    model = make_model("llama", 2, 2, "isolated")

    def fail(step: int, ids: np.ndarray) -> None:
        model.wafer.place(np.zeros(3, np.float32))
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        model.generate(PROMPT, NEW, on_token=fail)
    assert not model.wafer.sram.live
