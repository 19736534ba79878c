"""SRAM as a state machine, against an account of every core in plain NumPy; and the arenas, which must fit what the account lets in."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import wse_emu as wse
from wse_emu.wafer.cores import Arena, Block
from wse_emu.wafer.sram import Reservation, SramMark, SramTracker

from .programs import MAX_EXAMPLES

ROWS, COLS, CAPACITY, BASE = 3, 4, 400, 40
SPEC = replace(wse.TINY, sram_bytes_per_core=CAPACITY, base_code_bytes=BASE)
FACTORS = st.integers(0, 4)


class Sram(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sram = SramTracker(SPEC, ROWS, COLS)
        self.held: dict[int, tuple[Reservation, np.ndarray]] = {}
        self.codes: list[tuple[ExitStack, int]] = []
        self.high = BASE
        self.high_by_core = np.full((ROWS, COLS), BASE)
        self.mark: tuple[SramMark, set[int]] | None = None

    def by_core(self) -> np.ndarray:
        """Bytes of every core, code included."""
        code = self.codes[-1][1] if self.codes else 0
        return sum((size for _, size in self.held.values()), np.zeros((ROWS, COLS), np.int64)) + BASE + code

    def note(self) -> None:
        now = self.by_core()
        if now.max() > self.high:
            self.high, self.high_by_core = int(now.max()), now

    @rule(
        rows=st.lists(FACTORS, min_size=ROWS, max_size=ROWS), cols=st.lists(FACTORS, min_size=COLS, max_size=COLS),
        itemsize=st.sampled_from([1, 2, 4, 8]), name=st.sampled_from("abc"),
    )  # fmt: skip
    def allocate(self, rows: list[int], cols: list[int], itemsize: int, name: str) -> None:
        size = -(-np.multiply.outer(rows, cols) * itemsize // 4) * 4
        after = self.by_core() + size
        if after.max() > CAPACITY:
            self.overflows(lambda: self.sram.allocate(name, np.array(rows), np.array(cols), itemsize), name, size)
            return
        reservation = self.sram.allocate(name, np.array(rows), np.array(cols), itemsize)
        self.held[reservation.id] = reservation, size
        self.note()

    def overflows(self, act: Any, name: str, size: np.ndarray) -> None:
        """The error names a fullest core, what lies there and what does not fit; and nothing changed."""
        before, used = self.sram.live, self.sram.used_bytes()
        with pytest.raises(wse.SramOverflowError) as caught:
            act()
        lies = caught.value.core_map
        code = self.codes[-1][1] if self.codes and not name.startswith("code of") else 0
        tensors = sum((size for _, size in self.held.values()), np.zeros((ROWS, COLS), np.int64))
        after = tensors + BASE + code + size
        assert after[lies.row, lies.col] == after.max() == lies.used_bytes > lies.capacity_bytes == CAPACITY
        need = int(size[lies.row, lies.col])
        assert lies.blocks[-1] == (f"{name} (does not fit)", need)
        assert sum(n for _, n in lies.blocks) == lies.used_bytes
        free = max(0, CAPACITY - (lies.used_bytes - need))
        assert str(caught.value).startswith(
            f"core ({lies.row}, {lies.col}): `{name}` needs {need} bytes, {free} of {CAPACITY} are free; use more rows or columns"
        )
        assert (self.sram.live, self.sram.used_bytes()) == (before, used)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        reservation, _ = self.held.pop(key)
        self.sram.free(reservation)
        with pytest.raises(wse.SramStateError, match=rf"`{reservation.name}` is not on the wafer: it was freed before"):
            self.sram.free(reservation)

    @precondition(lambda self: len(self.codes) < 3)
    @rule(size=st.integers(0, 300))
    def begin_code(self, size: int) -> None:
        tensors = sum((held for _, held in self.held.values()), np.zeros((ROWS, COLS), np.int64))
        if tensors.max() + BASE + size > CAPACITY:
            self.overflows(lambda: self.sram.code("k", size).__enter__(), "code of k", np.full((ROWS, COLS), size))
            return
        stack = ExitStack()
        stack.enter_context(self.sram.code("k", size))
        self.codes.append((stack, size))
        self.note()

    @precondition(lambda self: self.codes)
    @rule()
    def end_code(self) -> None:
        stack, _ = self.codes.pop()
        stack.close()

    @precondition(lambda self: not self.codes)
    @rule()
    def remember(self) -> None:
        self.mark = self.sram.mark(), set(self.held)

    @precondition(lambda self: self.mark is not None and not self.codes)
    @rule()
    def go_back(self) -> None:
        assert self.mark is not None
        mark, then = self.mark
        self.sram.back_to(mark)
        self.held = {key: entry for key, entry in self.held.items() if key in then}
        self.mark = None

    @invariant()
    def account_is_right(self) -> None:
        now = self.by_core()
        assert self.sram.used_bytes() == now.max()
        assert self.sram.high_water_bytes == self.high
        np.testing.assert_array_equal(self.sram.high_water_by_core, self.high_by_core)
        assert self.sram.live == tuple(r.name for r, _ in self.held.values())
        row, col = self.sram.worst_core()
        assert now[row, col] == now.max()
        code = self.codes[-1][1] if self.codes else 0
        for at in np.ndindex(ROWS, COLS):
            blocks = [("base code", BASE), *([("kernel code", code)] if code else [])]
            blocks += [(r.name, int(size[at])) for r, size in self.held.values() if size[at]]
            lies = self.sram.core_map(*at)
            assert (lies.used_bytes, lies.blocks) == (now[at], tuple(blocks))
        if self.sram.high_water_map is not None:
            assert self.sram.high_water_map.used_bytes == self.high


Sram.TestCase.settings = settings(max_examples=2 * MAX_EXAMPLES, stateful_step_count=20, deadline=None)
TestSram = Sram.TestCase


class Memory(RuleBasedStateMachine):
    """One arena: what is written stays, wherever the arena moves it, and it takes in all that the account would."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena((0, 0), replace(SPEC, base_code_bytes=BASE - 1))
        self.room = (CAPACITY - BASE + 1) // 4 * 4
        self.blocks: list[tuple[Block, np.ndarray]] = []
        self.parts: list[tuple[Block, Block, Any]] = []

    def used(self) -> int:
        return sum(-(-block.array.nbytes // 4) * 4 for block, _ in self.blocks)

    @rule(n=st.integers(0, 24), dtype=st.sampled_from(["float32", "int64", "float64", "uint8", "bool"]), seed=st.integers(0, 99))
    def allocate(self, n: int, dtype: str, seed: int) -> None:
        size = -(-n * np.dtype(dtype).itemsize // 4) * 4
        if self.used() + size > self.room:
            with pytest.raises(wse.SramOverflowError, match=r"core \(0, 0\): `b` needs \d+ bytes; blocks hold \d+ of 360"):
                self.arena.allocate("b", (n,), dtype)
            return
        block = self.arena.allocate("b", (n,), dtype)
        assert block.array.flags.aligned
        assert not block.defined.any()
        if n:
            with pytest.raises(wse.UninitializedReadError):
                block.read()
        values = np.random.default_rng(seed).integers(0, 2, n).astype(dtype)
        block.write(values)
        self.blocks.append((block, values))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block, _ = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.parts = [(whole, part, where) for whole, part, where in self.parts if whole is not block]
        self.arena.free(block)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), start=st.integers(0, 5), stop=st.integers(5, 24))
    def look_at_a_part(self, data: st.DataObject, start: int, stop: int) -> None:
        block, _ = data.draw(st.sampled_from(self.blocks))
        self.parts.append((block, block.view(slice(start, stop)), slice(start, stop)))

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        for block, values in self.blocks:
            np.testing.assert_array_equal(block.read(), values)
            assert block.array.flags.aligned
        for whole, part, where in self.parts:
            assert part.array.size == 0 or np.shares_memory(part.array, whole.array)
            np.testing.assert_array_equal(part.read(), whole.read()[where])
        for i, (block, _) in enumerate(self.blocks):
            assert not any(np.shares_memory(block.array, other.array) for other, _ in self.blocks[:i])


Memory.TestCase.settings = settings(max_examples=2 * MAX_EXAMPLES, stateful_step_count=25, deadline=None)
TestMemory = Memory.TestCase


def test_parts_of_a_part_follow_a_moved_block() -> None:
    arena = Arena((0, 0), SPEC)
    first, second = arena.allocate("a", (10,), np.float32), arena.allocate("b", (60,), np.float32)
    second.write(np.arange(60))
    inner = second.shaped(6, 10).view(slice(2, 5)).view(slice(1, 2))
    arena.free(first)
    arena.allocate("c", (28,), np.float32)  # fits only when the two holes become one
    np.testing.assert_array_equal(inner.read(), np.arange(30, 40).reshape(1, 10))
    inner.write(7)
    assert (second.array[30:40] == 7).all()


@given(st.integers(1, 6), st.sampled_from(["float32", "float64", "int32", "int64", "uint8", "bool"]))
def test_fresh_memory_is_poisoned_and_so_is_what_was_freed(n: int, dtype: str) -> None:
    arena = Arena((0, 0), SPEC)
    block = arena.allocate("a", (n,), dtype)
    poison = block.array.copy()
    assert np.isnan(poison).all() if poison.dtype.kind == "f" else (poison == (1 if dtype == "bool" else np.iinfo(dtype).max)).all()
    block.write(0)
    arena.free(block)
    assert block.array.tobytes() == poison.tobytes()
    assert not block.defined.any()


def test_an_output_that_a_kernel_leaves_out_stays_undefined() -> None:
    @wse.kernel(out=("y",))
    def only_the_first(x, y):
        y[0, 0] = x[0, 0] * np.float32(np.nan)

    for executor in ("isolated", "interpreted"):
        wafer = wse.Wafer(wse.TINY, rows=1, cols=1, executor=executor)
        x, y = (
            wafer.place(np.ones((2, 2), np.float32), name="x"),
            wafer.empty("y", wafer.placement((2, 2), ("row", wse.Split.balanced(2, 1)), (None, None))),
        )
        wafer.launch(only_the_first, x=x, y=y)
        assert np.isnan(y.block(0, 0)[0, 0])
        with pytest.raises(
            wse.UninitializedReadError, match=r"core \(0, 0\): `y` is read, but 3 of its 4 elements were written by no kernel"
        ):
            y.gather()
        wafer.inject(y, np.zeros((2, 2), np.float32))
        wafer.launch(only_the_first, x=x, y=y)
        assert y.gather()[1, 1] == 0


def test_the_report_names_the_worst_core() -> None:
    wafer = wse.Wafer(wse.TINY, rows=1, cols=3)
    assert wafer.sram_report() == "nothing was placed yet"
    with wafer.place(np.ones((2, 7), np.float32), name="x"):
        assert wafer.sram_report() == "core (0, 2): 4200 of 49152 bytes\n  base code      4176\n  x                24"
