"""The machine: a rectangle of cores that holds placed tensors, launches kernels and moves data, and writes down what it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import KernelError, PlacementError, RouteError, SpecError
from wse_emu.foundation.wafer_spec import WSE3, WaferSpec
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Cores
from wse_emu.wafer.kernel import Kernel, Scratch
from wse_emu.wafer.ledger import Event, Ledger
from wse_emu.wafer.placement import GridAxis, Ints, Placement, Split, placed
from wse_emu.wafer.sram import Reservation, SramTracker
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.turn import Turn, in_turn
from wse_kernels._jit import COMPILE_ERRORS
from wse_kernels.launch import make_driver

Executor = Literal["batched", "isolated", "interpreted", "dry"]
EXECUTORS: Final = ("batched", "isolated", "interpreted", "dry")
_WORD: Final = 4


class _LaunchPlan(NamedTuple):
    """What does not change between launches of a kernel on tensors placed alike."""

    rows: Ints
    """Rows that compute in the batched executor (replicas once)."""
    used_rows: Ints
    used_cols: Ints
    macs: int


class Wafer:
    """A grid of cores, each with SRAM of its own, joined by a fabric.

    Parameters
    ----------
    spec : WaferSpec, default WSE3
        The device.
    rows, cols : int
        Rectangle of cores to use; at most the fabric.
    executor : {"batched", "isolated", "interpreted", "dry"}
        How kernels run: all cores in one compiled loop; one core at a time in a byte arena of its own; the same as plain Python; or shapes
        and counts only. All that compute agree bit for bit and leave the same ledger.

    Raises
    ------
    SpecError
        If the rectangle does not lie on the fabric or the executor is unknown.
    """

    def __init__(self, spec: WaferSpec = WSE3, *, rows: int | None = None, cols: int | None = None, executor: Executor = "batched") -> None:
        if not isinstance(spec, WaferSpec):
            raise SpecError(f"`spec` must be a WaferSpec (WSE3, or dataclasses.replace(WSE3, ...)), got {show(spec)}")
        rows = spec.usable_rows if rows is None else rows
        cols = spec.usable_cols if cols is None else cols
        for name, value, most in (("rows", rows, spec.n_rows), ("cols", cols, spec.n_cols)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
                raise SpecError(
                    f"`{name}` must be an integer in 1..{most} ({spec.name} has {spec.n_rows} x {spec.n_cols} cores), got {show(value)}"
                )
        if not isinstance(executor, str) or executor not in EXECUTORS:
            raise SpecError(f"`executor` must be one of {', '.join(EXECUTORS)}, got {show(executor)}")
        self.spec = spec
        self.rows = int(rows)
        self.cols = int(cols)
        self.executor: Executor = executor
        self.ledger = Ledger()
        """What was done and moved."""
        self.turn = Turn()
        """One thread at a time runs here; the others wait."""
        self.sram = SramTracker(spec, self.rows, self.cols, self.turn)
        """What lies on every core."""
        self.cores: Cores | None = None
        """The arenas of the isolated and interpreted executors."""
        if executor in ("isolated", "interpreted"):
            self.cores = Cores(spec, self.rows, self.cols, interpreted=executor == "interpreted")
        self._colors: dict[str, int] = {}
        """Colors that the routes of each kind of move take, of the moves seen so far."""
        self._plans: dict[tuple[Any, ...], _LaunchPlan] = {}

    def __repr__(self) -> str:
        return f"Wafer({self.spec.name}, rows={self.rows}, cols={self.cols}, executor={self.executor!r})"

    @property
    def n_cores(self) -> int:
        """Cores of the rectangle."""
        return self.rows * self.cols

    @property
    def is_dry(self) -> bool:
        """Whether only shapes and counts move."""
        return self.executor == "dry"

    def sram_report(self) -> str:
        """The worst core at the high-water mark and what lay on it, as text."""
        lies = self.sram.high_water_map
        return str(lies) if lies is not None else "nothing was placed yet"

    def record(self, event: Event) -> None:
        """Write an event in the ledger; a move of a kind not seen before takes its colors.

        Raises
        ------
        RouteError
            If the routes of all kinds of moves together need more colors than the fabric has.
        """
        if event.colors > self._colors.get(event.kind, 0):
            taken = {**self._colors, event.kind: event.colors}
            if sum(taken.values()) > self.spec.n_colors:
                needs = ", ".join(f"{kind} {n}" for kind, n in taken.items())
                raise RouteError(
                    f"{event.kind} of `{event.name}`: the routes need {sum(taken.values())} colors ({needs}), "
                    f"{self.spec.name} has {self.spec.n_colors}"
                )
            self._colors = taken
        self.ledger.record(event)

    # ---- tensors

    def placement(
        self, shape: tuple[int, int], rows: tuple[GridAxis | None, Split | None], cols: tuple[GridAxis | None, Split | None]
    ) -> Placement:
        """Placement of a two-axis tensor on this grid; see `Placement`."""
        return placed(shape, rows, cols, self.rows, self.cols)

    @in_turn
    def empty(self, name: str, placement: Placement, dtype: DTypeLike = np.float32, *, ndim: int = 2) -> PlacedTensor:
        """Reserve SRAM for a tensor; its content is undefined.

        Raises
        ------
        SramOverflowError
            If it does not fit on some core.
        """
        dtype = np.dtype(dtype)
        reservation = self.sram.allocate(name, placement.row_factor, placement.col_factor, dtype.itemsize)
        data: NDArray[Any] | None = None
        blocks: dict[tuple[int, int], Block] | None = None
        if self.cores is not None:
            blocks = {}
            for row in np.flatnonzero(placement.row_factor):
                for col in np.flatnonzero(placement.col_factor):
                    i0, i1, j0, j1 = placement.ranges(int(row), int(col))
                    shape = (i1 - i0, j1 - j0) if ndim == 2 else (j1 - j0,)
                    blocks[int(row), int(col)] = self.cores.arena(int(row), int(col)).allocate(name, shape, dtype)
        elif not self.is_dry:
            data = np.empty(placement.shape[0] * placement.shape[1], dtype)
        return PlacedTensor(self, name, placement, dtype, ndim, reservation, data, blocks)

    @in_turn
    def release(self, tensor: PlacedTensor, reservation: Reservation) -> None:
        """Give a tensor's SRAM back (`PlacedTensor.free` calls this)."""
        self.sram.free(reservation)
        if tensor.blocks is not None and self.cores is not None:
            for (row, col), block in tensor.held.items():
                self.cores.arena(row, col).free(block)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take what the block placed off the wafer again if it fails, even if an interrupt (Ctrl-C) fell in the middle of an allocation."""
        sram, blocks, scope = self.sram.mark(), None if self.cores is None else self.cores.mark(), self.ledger.current_scope
        try:
            yield
        except BaseException:
            while True:  # a second Ctrl-C changes nothing: the run fails already
                try:
                    self.sram.back_to(sram)
                    if self.cores is not None and blocks is not None:
                        self.cores.back_to(blocks)
                    self.ledger.current_scope = scope
                    break
                except KeyboardInterrupt:
                    continue
            raise

    @in_turn
    def place(self, array: ArrayLike, *, axes: Sequence[GridAxis | None] | None = None, name: str = "x") -> PlacedTensor:
        """Bring a host array onto the wafer, balanced over the grid.

        Parameters
        ----------
        array : array_like, one or two axes
            Elements of 4 or 8 bytes.
        axes : sequence of {"row", "col", None}, optional
            Grid axis that splits each tensor axis; None keeps the axis whole on every core. Default: rows over rows, columns over columns;
            one axis over columns.
        name : str
            Name in reports.

        Returns
        -------
        PlacedTensor

        Raises
        ------
        PlacementError
            If the array has not one or two axes, or an element size that is no whole number of wavelets, or `axes` does not fit it.
        SramOverflowError
            If it does not fit.
        """
        host = np.ascontiguousarray(array)
        if host.ndim not in (1, 2):
            raise PlacementError(f"`{name}` must have one or two axes, got shape {host.shape}")
        if host.dtype.itemsize % _WORD:
            raise PlacementError(f"`{name}`: elements must fill whole 32-bit words, got {host.dtype}; convert to float32 or int32")
        names: Sequence[GridAxis | None] = (("row", "col") if host.ndim == 2 else ("col",)) if axes is None else axes
        if len(names) != host.ndim:
            raise PlacementError(f"`{name}` has {host.ndim} axes, `axes` names {len(names)}")
        length = {"row": self.rows, "col": self.cols, None: 1}
        for axis in names:
            if axis not in length:
                raise PlacementError(f"`{name}`: `axes` may hold 'row', 'col' and None, got {axis!r}")
        pairs = [(grid, Split.balanced(n, length[grid])) for grid, n in zip(names, host.shape, strict=True)]
        if host.ndim == 1:
            pairs.insert(0, (None, Split.balanced(1, 1)))
        shape = (1, host.shape[0]) if host.ndim == 1 else (host.shape[0], host.shape[1])
        tensor = self.empty(name, self.placement(shape, *pairs), host.dtype, ndim=host.ndim)
        try:
            self.inject(tensor, host)
        except BaseException:
            tensor.free()
            raise
        return tensor

    # ---- the wafer's edge

    @in_turn
    def inject(self, tensor: PlacedTensor, array: NDArray[Any] | None, *, kind: str = "inject") -> None:
        """Bring host data in at the north edge: every core gets its block down its column.

        Parameters
        ----------
        tensor : PlacedTensor
            Written.
        array : ndarray of the tensor's shape, or None with the ``dry`` executor
        kind : str
            Account in the ledger.
        """
        place = tensor.placement
        if self.cores is None:
            words = place.row_factor * (tensor.dtype.itemsize // _WORD)
            self.record(costs.edge(kind, tensor.name, words, place.col_factor))
            if tensor.data is not None:
                _to_panels(np.asarray(array, tensor.dtype).reshape(place.shape), place, tensor.data)
            return
        traffic = self.cores.traffic()
        host = np.asarray(array, tensor.dtype).reshape(place.shape)
        for (row, col), block in tensor.held.items():
            i0, i1, j0, j1 = place.ranges(row, col)
            self.cores.from_edge(traffic, host[i0:i1, j0:j1], col, [block])
        self.record(traffic.event(kind, tensor.name, costs.COLORS[kind]))

    @in_turn
    def drain(self, tensor: PlacedTensor, *, kind: str = "drain") -> NDArray[Any]:
        """Take a tensor out at the north edge; replicas leave once.

        Returns
        -------
        ndarray
            Whole tensor; with the ``dry`` executor, zeros.
        """
        place = tensor.placement
        whole = np.zeros(place.shape, tensor.dtype)
        rows, cols = self._once(place.split_of("row"), self.rows), self._once(place.split_of("col"), self.cols)
        if self.cores is None:
            words = np.zeros(self.rows, np.int64)
            words[rows] = place.row_factor[rows] * (tensor.dtype.itemsize // _WORD)
            factor = np.zeros(self.cols, np.int64)
            factor[cols] = place.col_factor[cols]
            self.record(costs.edge(kind, tensor.name, words, factor))
            if tensor.data is not None:
                _from_panels(tensor.data, place, whole)
        else:
            traffic = self.cores.traffic()
            for row in rows:
                for col in cols:
                    block = tensor.held.get((int(row), int(col)))
                    if block is not None:
                        i0, i1, j0, j1 = place.ranges(int(row), int(col))
                        whole[i0:i1, j0:j1] = self.cores.to_edge(traffic, block).reshape(i1 - i0, j1 - j0)
            self.record(traffic.event(kind, tensor.name, costs.COLORS[kind]))
        return whole.reshape(tensor.shape)

    @staticmethod
    def _once(split: Split | None, n: int) -> Ints:
        return np.zeros(1, np.int64) if split is None else split.representatives

    # ---- launches

    @in_turn
    def launch(self, kernel: Kernel, **args: Any) -> None:
        """Run a kernel on every core whose blocks are not empty.

        Parameters
        ----------
        kernel : Kernel
            What one core does.
        **args
            By parameter name: placed tensors, `scratch` requests and scalars (NumPy scalars keep their type; a Python float is refused).

        Raises
        ------
        KernelError
            If an argument is missing, unknown or of the wrong kind, replicas of one tensor meet another row split, or the body does not
            compile.
        UninitializedReadError
            If a core would read what nothing wrote (isolated and interpreted executors).
        """
        tensors = self._check_args(kernel, args)
        plan = self._plan(kernel, args, tensors)
        with self.sram.code(kernel.name, kernel.code_bytes):
            reserved = self._reserve_scratch(kernel, args)
            try:
                macs = plan.macs
                if self.cores is not None:
                    macs = self._launch_isolated(kernel, args, plan)
                elif not self.is_dry:
                    self._launch_batched(kernel, args, plan)
            except COMPILE_ERRORS as error:
                raise kernel.does_not_compile(error) from error
            finally:
                for reservation in reserved:
                    self.sram.free(reservation)
        count = int(plan.used_rows.size * plan.used_cols.size)
        self.record(Event(None, "", "launch", kernel.name, count=count, macs=macs))

    @in_turn
    def account(self, kernel: Kernel, **args: Any) -> None:
        """Write a launch in the ledger whose work a fused driver does elsewhere; arguments as for `launch`."""
        plan = self._plan(kernel, args, self._check_args(kernel, args))
        with self.sram.code(kernel.name, kernel.code_bytes):
            count = int(plan.used_rows.size * plan.used_cols.size)
        self.record(Event(None, "", "launch", kernel.name, count=count, macs=plan.macs))

    def _check_args(self, kernel: Kernel, args: dict[str, Any]) -> dict[str, PlacedTensor]:
        if not isinstance(kernel, Kernel):
            raise KernelError(f"`launch` takes a kernel, got {kernel!r}; declare the function with @wse.kernel(out=(...))")
        if set(args) != set(kernel.params):
            wrong = [("missing", set(kernel.params) - set(args)), ("unknown", set(args) - set(kernel.params))]
            said = "; ".join(f"{word} {', '.join(f'`{name}`' for name in sorted(names))}" for word, names in wrong if names)
            raise KernelError(f"kernel `{kernel.name}` takes {', '.join(f'`{name}`' for name in kernel.params)}: {said}")
        tensors: dict[str, PlacedTensor] = {}
        for name, arg in args.items():
            if isinstance(arg, PlacedTensor):
                if arg.wafer is not self:
                    raise KernelError(f"kernel `{kernel.name}`: `{name}` lies on another wafer")
                tensors[name] = arg
            elif (name in kernel.scratch) != isinstance(arg, Scratch):
                raise KernelError(f"kernel `{kernel.name}`: `{name}` must {'' if name in kernel.scratch else 'not '}be a scratch request")
            elif isinstance(arg, (float, complex, np.ndarray, list)):
                raise KernelError(
                    f"kernel `{kernel.name}`: `{name}` must be a placed tensor or a typed scalar, got {type(arg).__name__}; "
                    f"place the array, or write np.float32(...)"
                )
        if not tensors:
            raise KernelError(f"kernel `{kernel.name}`: no argument is a placed tensor")
        for name in (*kernel.out, *kernel.inout):
            if name not in tensors:
                raise KernelError(f"kernel `{kernel.name}`: `{name}` is written, so it must be a placed tensor")
        return tensors

    def _plan(self, kernel: Kernel, args: dict[str, Any], tensors: dict[str, PlacedTensor]) -> _LaunchPlan:
        scalars = tuple(v for n, v in sorted(args.items()) if n not in tensors and not isinstance(v, Scratch)) if kernel.macs else ()
        key = (kernel, tuple((n, t.placement, t.ndim) for n, t in tensors.items()), scalars)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 4096:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(kernel, args, tensors)
        return plan

    def _make_plan(self, kernel: Kernel, args: dict[str, Any], tensors: dict[str, PlacedTensor]) -> _LaunchPlan:
        splits: dict[GridAxis, list[Split]] = {"row": [], "col": []}
        for tensor in tensors.values():
            for axis in splits:
                split = tensor.placement.split_of(axis)
                if split is not None and split not in splits[axis]:
                    splits[axis].append(split)
        used_rows, used_cols = _all_used(splits["row"], self.rows), _all_used(splits["col"], self.cols)
        rows = used_rows
        if any(not s.is_partition for s in splits["row"]):
            representatives = splits["row"][0].representatives
            if any(not np.array_equal(s.representatives, representatives) for s in splits["row"]):
                raise KernelError(f"kernel `{kernel.name}`: its tensors replicate rows differently; redistribute one of them first")
            rows = representatives[np.isin(representatives, used_rows)]
        if not splits["row"]:
            rows = used_rows[:1]
        macs = 0
        if kernel.macs is not None:
            for row, n_rows in _classes([s.sizes for s in splits["row"]], used_rows):
                for col, n_cols in _classes([s.sizes for s in splits["col"]], used_cols):
                    shapes: dict[str, Any] = {n: t.block_shape(row, col) for n, t in tensors.items()}
                    shapes.update({n: a for n, a in args.items() if n not in tensors})
                    macs += kernel.macs(shapes) * n_rows * n_cols
        return _LaunchPlan(rows, used_rows, used_cols, macs)

    def _reserve_scratch(self, kernel: Kernel, args: dict[str, Any]) -> list[Reservation]:
        rows = np.ones(self.rows, np.int64)
        sizes = {name: int(np.prod(args[name].shape)) for name in kernel.scratch}
        return [self.sram.allocate(name, rows, np.full(self.cols, n), args[name].dtype.itemsize) for name, n in sizes.items()]

    def _launch_batched(self, kernel: Kernel, args: dict[str, Any], plan: _LaunchPlan) -> None:
        kinds: list[str] = []
        values: list[Any] = []
        for name in kernel.params:
            arg = args[name]
            if isinstance(arg, PlacedTensor):
                kinds.append(str(arg.ndim))
                values += [arg.data, arg.placement.table]
            elif isinstance(arg, Scratch):
                kinds.append("w" if len(arg.shape) == 2 else "v")
                values.append(np.empty((plan.rows.size * plan.used_cols.size, *arg.shape), arg.dtype))
            else:
                kinds.append("s")
                values.append(arg)
        driver = make_driver(kernel.body, "".join(kinds), takes_core=kernel.takes_core)
        units = plan.macs + sum(value.size for value in values if isinstance(value, np.ndarray))
        driver(units, plan.rows, plan.used_cols, self.rows, self.cols, *values)

    def _launch_isolated(self, kernel: Kernel, args: dict[str, Any], plan: _LaunchPlan) -> int:
        assert self.cores is not None
        macs = 0
        for row in plan.used_rows.tolist():
            for col in plan.used_cols.tolist():
                arena = self.cores.arena(row, col)
                blocks: dict[str, Any] = {}
                borrowed: list[Block] = []
                for name, arg in args.items():
                    if isinstance(arg, PlacedTensor):
                        blocks[name] = arg.held[row, col]
                    elif isinstance(arg, Scratch):
                        blocks[name] = arena.allocate(name, arg.shape, arg.dtype)
                        borrowed.append(blocks[name])
                    else:
                        blocks[name] = arg
                try:
                    macs += self.cores.run(kernel, (row, col), blocks)
                finally:
                    for block in borrowed:
                        arena.free(block)
        return macs


def _all_used(splits: list[Split], n: int) -> Ints:
    used = np.ones(n, np.bool_)
    for split in splits:
        used &= split.sizes > 0
    return np.flatnonzero(used)


def _classes(sizes: list[Ints], used: Ints) -> list[tuple[int, int]]:
    """(a position, how many are like it) for positions in `used` that agree in all `sizes`."""
    if not used.size:
        return []
    if not sizes:
        return [(int(used[0]), int(used.size))]
    _, first, counts = np.unique(np.stack([s[used] for s in sizes]), axis=1, return_index=True, return_counts=True)
    return [(int(used[f]), int(n)) for f, n in zip(first, counts, strict=True)]


def _to_panels(whole: NDArray[Any], place: Placement, flat: NDArray[Any]) -> None:
    """Write an (m, n) array into the flat buffer of a placed tensor."""
    for start, stop in _panels(place):
        flat[place.shape[0] * start : place.shape[0] * stop].reshape(place.shape[0], stop - start)[...] = whole[:, start:stop]


def _from_panels(flat: NDArray[Any], place: Placement, whole: NDArray[Any]) -> None:
    """Inverse of `_to_panels`."""
    for start, stop in _panels(place):
        whole[:, start:stop] = flat[place.shape[0] * start : place.shape[0] * stop].reshape(place.shape[0], stop - start)


def _panels(place: Placement) -> list[tuple[int, int]]:
    grid, split = place.axis1
    if grid is None or place.shape[0] == 1:
        return [(0, place.shape[1])]
    if not split.is_partition:
        raise RouteError("columns of a tensor cannot be replicated over the grid and gathered")
    return [(int(split.starts[i]), int(split.stops[i])) for i in split.used]
