"""One small program run by every executor: the same bits, the same ledger, the same SRAM; and the strategies that draw grids and splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.wafer.cores import Cores
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Placement, Split
from wse_emu.wafer.tensor import PlacedTensor

EXECUTORS = ("batched", "isolated", "interpreted", "dry")
DTYPES = ("float32", "float64", "int32", "int64", "uint32", "uint64")
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
MAX_EXAMPLES = settings.default.max_examples if settings.default.max_examples > 40 else 12
"""Of a property that runs every executor: few by default, all that a thorough profile asks for."""
SEEDS = st.integers(0, 2**32 - 1)

Array = NDArray[Any]
Program = Callable[[wse.Wafer], list[Array]]


def random_bits(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Elements of any bits, NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * size), dtype).reshape(shape).copy()


def numbers(seed: int, *shape: int) -> Array:
    """float32 of many magnitudes, zeros of both signs and infinities among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)
    special = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf, np.nan]), shape)
    return np.where(rng.random(shape) < 0.3, special, values).astype(np.float32)


def assert_same_bits(ours: Array, theirs: Array) -> None:
    """Equal bit for bit; a NaN equals any NaN, for no rule says which one a sum gives."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if ours.dtype.kind == "f":
        nan = np.isnan(theirs)
        np.testing.assert_array_equal(np.isnan(ours), nan)
        ours, theirs = np.where(nan, 0, ours), np.where(nan, 0, theirs)
    assert ours.tobytes() == theirs.tobytes()


class Copies:
    """Bytes and targets of everything that `Cores.deliver` really writes into an arena."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n_bytes = self.n_messages = 0
        real = Cores.deliver

        def deliver(cores: Cores, payload: Array, targets: Iterable[Any], to: Any) -> None:
            targets = list(targets)
            self.n_bytes += payload.nbytes
            self.n_messages += 1
            for target in targets:
                assert not np.shares_memory(payload, target.array), "a message is a copy"
            real(cores, payload, targets, to)

        patch.setattr(Cores, "deliver", deliver)


def run_everywhere(grid: tuple[int, int], program: Program, *, spec: wse.WaferSpec = wse.WSE3) -> tuple[list[Array], list[Event]]:
    """What `program` returns on all executors, and its events; raises unless values, ledgers and SRAM agree."""
    values: dict[str, list[Array]] = {}
    wafers = {name: wse.Wafer(spec, rows=grid[0], cols=grid[1], executor=name) for name in EXECUTORS}
    for name, wafer in wafers.items():
        with pytest.MonkeyPatch.context() as patch:
            copies = Copies(patch)
            values[name] = program(wafer)
        assert not wafer.sram.live, name
        if wafer.cores is not None:
            assert all(not arena.blocks for arena in wafer.cores._arenas.values()), name
            out = {"drain", "probe"}  # what leaves is read at the edge, by no core
            moved = [e for e in wafer.ledger.events() if e.kind not in {"launch", *out}]
            assert copies.n_bytes == sum(e.bytes for e in moved), name
            assert copies.n_messages == sum(e.count for e in moved), name
    first = wafers["batched"]
    for name, wafer in wafers.items():
        assert wafer.ledger.events() == first.ledger.events(), name
        assert wafer.sram.high_water_bytes == first.sram.high_water_bytes, name
        if name != "dry":
            assert len(values[name]) == len(values["batched"])
            for ours, theirs in zip(values[name], values["batched"], strict=True):
                assert_same_bits(ours, theirs)
    return values["batched"], first.ledger.events()


def look(tensor: PlacedTensor) -> list[Array]:
    """The whole tensor through the probe channel, and every core's block as it lies there; zeros from a dry wafer."""
    wafer = tensor.wafer
    whole = wafer.drain(tensor, kind="probe")
    return [whole] if wafer.is_dry else [whole, *(tensor.block(r, c).copy() for r in range(wafer.rows) for c in range(wafer.cols))]


def blocks_of(values: Array, place: Placement) -> list[Array]:
    """What `look` must return for a tensor with these values."""
    return [values, *(values[block_range(place, r, c)] for r in range(place.n_rows) for c in range(place.n_cols))]


def block_range(place: Placement, row: int, col: int) -> tuple[slice, slice]:
    """Range of one core's block, read off the splits."""
    at = {"row": row, "col": col, None: 0}
    (g0, s0), (g1, s1) = place.axis0, place.axis1
    return slice(int(s0.starts[at[g0]]), int(s0.stops[at[g0]])), slice(int(s1.starts[at[g1]]), int(s1.stops[at[g1]]))


def put(wafer: wse.Wafer, name: str, place: Placement, values: Array) -> PlacedTensor:
    """A tensor with values."""
    tensor = wafer.empty(name, place, values.dtype)
    wafer.inject(tensor, None if wafer.is_dry else values)
    return tensor


def refused_everywhere(
    grid: tuple[int, int], act: Callable[[wse.Wafer], object], error: type[Exception], match: str, *, spec: wse.WaferSpec = wse.WSE3,
    ready: Callable[[wse.Wafer], dict[str, PlacedTensor]] = lambda wafer: {},
) -> None:  # fmt: skip
    """`act(wafer, **ready(wafer))` raises the same error on all executors, and leaves no event, no byte of SRAM and no value changed."""
    said = set()
    for name in EXECUTORS:
        wafer = wse.Wafer(spec, rows=grid[0], cols=grid[1], executor=name)
        tensors = ready(wafer)
        events, used = wafer.ledger.events(), wafer.sram.used_bytes()
        before = {key: contents(t) for key, t in tensors.items()}
        with pytest.raises(error, match=match) as caught:
            act(wafer, **tensors)
        assert isinstance(caught.value, wse.WseError), name
        said.add(str(caught.value))
        assert wafer.ledger.events() == events, name
        assert wafer.sram.used_bytes() == used, name
        for key, tensor in tensors.items():
            assert contents(tensor) == before[key], (name, key)
    assert len(said) == 1, said


def contents(tensor: PlacedTensor) -> list[bytes]:
    """Bytes of every block; nothing of a freed tensor or from a dry wafer."""
    if tensor.data is not None:
        return [tensor.data.tobytes()]
    return [b.array.tobytes() + b.defined.tobytes() for b in (tensor.blocks or {}).values()]


@st.composite
def partitions(draw: st.DrawFn, total: int, parts: int) -> Split:
    """A partition, balanced or not, with empty parts anywhere."""
    if draw(st.booleans()):
        return Split.balanced(total, parts)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, total), min_size=parts - 1, max_size=parts - 1))), total]
    return Split(total, np.array(cuts[:-1]), np.array(cuts[1:]))


@st.composite
def splits(draw: st.DrawFn, total: int, parts: int) -> Split:
    """Any split: partitions, in any order, everything on one part or on several, and bands of replicas."""
    kind = draw(st.sampled_from(["partition", "order", "single", "everywhere", "bands"]))
    if kind == "partition":
        return draw(partitions(total, parts))
    if kind == "order":
        split, order = draw(partitions(total, parts)), draw(st.permutations(range(parts)))
        return Split(total, split.starts[order], split.stops[order])
    if kind == "single":
        return Split.single(total, draw(st.integers(0, parts - 1)), parts)
    if kind == "everywhere":
        at = draw(st.sets(st.integers(0, parts - 1), min_size=1))
        return Split.everywhere(total, parts, sorted(at))
    inner = draw(partitions(total, draw(st.integers(1, parts))))
    rest = draw(st.lists(st.integers(0, len(inner) - 1), min_size=parts - len(inner), max_size=parts - len(inner)))
    index = draw(st.permutations([*range(len(inner)), *rest]))
    return Split(total, inner.starts[index], inner.stops[index])


@st.composite
def placements(draw: st.DrawFn, shape: tuple[int, int], grid: tuple[int, int]) -> Placement:
    """Any placement: each axis over rows, over columns or whole."""
    first, second = draw(
        st.sampled_from([("row", "col"), ("col", "row"), ("row", None), (None, "row"), ("col", None), (None, "col"), (None, None)])
    )
    length = {"row": grid[0], "col": grid[1], None: 1}
    pairs = [
        (axis, draw(splits(n, length[axis])) if axis else Split.balanced(n, 1)) for axis, n in zip((first, second), shape, strict=True)
    ]
    return Placement(shape, *pairs, *grid)
