"""The machine: a rectangle of cores that holds placed tensors, launches kernels and moves data, and writes down what it does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import KernelError, PlacementError, RouteError, SpecError
from wse_emu.foundation.precision import HalfType
from wse_emu.foundation.wafer_spec import WSE3, WaferSpec
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Cores
from wse_emu.wafer.kernel import Kernel, Scratch
from wse_emu.wafer.ledger import Event, Ledger
from wse_emu.wafer.pending import Pending
from wse_emu.wafer.placement import GridAxis, Ints, Placement, Split, placed
from wse_emu.wafer.sram import Reservation, SramTracker
from wse_emu.wafer.storage import FORMATS, HALF_BYTES
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.turn import Turn, in_turn
from wse_kernels._jit import COMPILE_ERRORS
from wse_kernels.launch import make_driver

Executor = Literal["batched", "isolated", "interpreted", "dry"]
EXECUTORS: Final = ("batched", "isolated", "interpreted", "dry")
_WORD: Final = 4
_NOTHING: Final = nullcontext()
_FLOAT32: Final = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _LaunchPlan:
    """What does not change between launches of a kernel on tensors placed alike."""

    rows: Ints
    """Rows that compute in the batched executor (replicas once)."""
    cols: Ints
    """Columns, likewise."""
    used_rows: Ints
    used_cols: Ints
    macs: int

    def event(self, kernel: Kernel, macs: int) -> Event:
        """What the ledger says of a launch."""
        return Event(None, "", "launch", kernel.name, count=int(self.used_rows.size * self.used_cols.size), macs=macs)


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
        self.pending = Pending(self.turn)
        """What is not computed yet."""
        self.cores: Cores | None = None
        """The arenas of the isolated and interpreted executors."""
        if executor in ("isolated", "interpreted"):
            self.cores = Cores(spec, self.rows, self.cols, interpreted=executor == "interpreted")
        self.counts_visits = True
        """Whether attention says what its tiles of queries visit and send; not where SRAM alone is asked for."""
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

    def record(self, *events: Event) -> None:
        """Write events in the ledger, all or none; a move of a kind not seen before takes its colors.

        Raises
        ------
        RouteError
            If the routes of all kinds of moves together need more colors than the fabric has.
        """
        self._colors = self._colors_with(events)
        self.ledger.extend(events)

    def check_routes(self, *events: Event) -> None:
        """Raise, before anything moves, what `record` would raise for these events."""
        self._colors_with(events)

    def _colors_with(self, events: Sequence[Event]) -> dict[str, int]:
        taken = self._colors
        for event in events:
            if event.colors <= taken.get(event.kind, 0):
                continue
            taken = {**taken, event.kind: event.colors}
            if sum(taken.values()) > self.spec.n_colors:
                needs = ", ".join(f"{kind} {n}" for kind, n in taken.items())
                raise RouteError(
                    f"{event.kind} of `{event.name}`: the routes need {sum(taken.values())} colors ({needs}), "
                    f"{self.spec.name} has {self.spec.n_colors}"
                )
        return taken

    def known_events(self, program: Hashable) -> tuple[Event, ...] | None:
        """What a program records, if it ran here before in exactly this situation; None if it must run whole, inside `first_run`.

        For programs whose events and reservations follow from their key alone, which free all that they reserve, and whose arithmetic a
        fused driver does. Cores that run one at a time always run them whole.
        """
        return None if self.cores is not None else self.sram.passed(program)

    @contextmanager
    def first_run(self, program: Hashable) -> Iterator[None]:
        """Note what the block records and reserves as what `program` does."""
        start = len(self.ledger)
        yield
        if self.cores is None:
            self.sram.pass_through(program, self.ledger.recorded(start))

    def working(self, program: Hashable | None, hold: Callable[[], AbstractContextManager[None]]) -> AbstractContextManager[None]:
        """The SRAM that a program works in, which `hold` reserves and gives back; nothing, if it ran here before in exactly this situation.

        For programs whose reservations follow from their key alone; None is never known.
        """
        if program is None:
            return hold()
        if self.cores is None and self.sram.passed(program):
            return _NOTHING
        return self._first_hold(program, hold)

    @contextmanager
    def _first_hold(self, program: Hashable, hold: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        with hold():
            yield
        if self.cores is None:
            self.sram.pass_through(program, True)

    # ---- tensors

    def placement(
        self, shape: tuple[int, int], rows: tuple[GridAxis | None, Split | None], cols: tuple[GridAxis | None, Split | None]
    ) -> Placement:
        """Placement of a two-axis tensor on this grid; see `Placement`.

        Parameters
        ----------
        shape : tuple of int
            (m, n) of the whole tensor.
        rows, cols : (grid axis, Split or None)
            For each tensor axis the grid axis that splits it (``"row"``, ``"col"``, or None: whole on every core), and how; without a split
            it is balanced.

        Raises
        ------
        PlacementError
            If the splits do not fit the shape or the grid.
        """
        pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in (shape, rows, cols)]
        if any(len(pair) != 2 for pair in pairs):
            raise PlacementError(
                f"a placement takes a shape (m, n) and a pair (grid axis, split) for each axis, got {show(shape)}, {show(rows)} and "
                f"{show(cols)}"
            )
        try:
            return placed(*pairs, self.rows, self.cols)
        except TypeError as error:  # what cannot be hashed is no integer, name or split
            raise PlacementError(f"a placement takes integers, grid axes and splits: {error}") from error

    @in_turn
    def empty(
        self, name: str, placement: Placement, dtype: DTypeLike = np.float32, *, ndim: int = 2, stored: HalfType | None = None
    ) -> PlacedTensor:
        """Reserve SRAM for a tensor; its content is undefined.

        Parameters
        ----------
        name : str
            Name in reports.
        placement : Placement
            From `placement`; the number of axes is 2, or 1 for a tensor of shape ``(1, n)`` that kernels see as a vector.
        dtype : dtype, default float32
            Integers and floating point numbers of 4 or 8 bytes.
        ndim : int
        stored : {"bfloat16", "float16", "cb16"}, optional
            The tensor's float32 numbers are rounded to this format (nearest, ties to even) wherever a launch or a move writes them, and
            take two bytes each. On the fabric each is a wavelet, as a float32 is.

        Raises
        ------
        PlacementError
            If the placement is for another grid, the element type is none of these, or `stored` is no format of 16 bits for float32.
        SramOverflowError
            If it does not fit on some core.
        """
        dtype = _FLOAT32 if dtype is np.float32 else _element_type(name, dtype)
        if not isinstance(placement, Placement):
            raise PlacementError(f"`{name}`: expected a placement, made by `Wafer.placement`, got {placement!r}")
        if (placement.n_rows, placement.n_cols) != (self.rows, self.cols):
            raise PlacementError(
                f"`{name}`: its placement is for {placement.n_rows} x {placement.n_cols} cores, the wafer has {self.rows} x {self.cols}"
            )
        if ndim not in (1, 2) or (ndim == 1 and (placement.shape[0] != 1 or placement.axis0[0] is not None)):
            raise PlacementError(f"`{name}`: `ndim` is 2, or 1 for a tensor of shape (1, n) with a whole first axis, got {ndim!r}")
        if stored is not None and (not isinstance(stored, str) or stored not in FORMATS or dtype != np.float32):
            formats = ", ".join(FORMATS)
            raise PlacementError(f"`{name}`: `stored` must be one of {formats} or None, of float32 numbers, got {show(stored)} of {dtype}")
        n_bytes = dtype.itemsize if stored is None else HALF_BYTES
        reservation = self.sram.allocate(name, placement.row_factor, placement.col_factor, n_bytes, placement.factor_bytes)
        data: NDArray[Any] | None = None
        blocks: dict[tuple[int, int], Block] | None = None
        if self.cores is not None:
            blocks = {}
            for row in np.flatnonzero(placement.row_factor):
                for col in np.flatnonzero(placement.col_factor):
                    i0, i1, j0, j1 = placement.ranges(int(row), int(col))
                    shape = (i1 - i0, j1 - j0) if ndim == 2 else (j1 - j0,)
                    blocks[int(row), int(col)] = self.cores.arena(int(row), int(col)).allocate(name, shape, dtype, stored)
        elif not self.is_dry:
            # Numbers that no program wrote must not be beyond a format's largest: `PlacedTensor.settle` looks at all.
            data = (np.empty if stored is None else np.zeros)(placement.shape[0] * placement.shape[1], dtype)
        return PlacedTensor(self, name, placement, dtype, ndim, reservation, data, blocks, stored)

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
                    self.pending.abandon()
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
            Integers or floating point numbers of 4 or 8 bytes.
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
            If the array has not one or two axes, or another element type, or `axes` does not fit it.
        SramOverflowError
            If it does not fit.
        """
        try:
            given = np.asarray(array)
        except ValueError as error:
            raise PlacementError(f"`{name}`: no array: {error}") from error
        if given.ndim not in (1, 2):
            raise PlacementError(f"`{name}` must have one or two axes, got shape {given.shape}")
        _element_type(name, given.dtype)
        host = np.ascontiguousarray(given)
        names: Sequence[GridAxis | None] = (("row", "col") if host.ndim == 2 else ("col",)) if axes is None else axes
        if len(names) != host.ndim:
            raise PlacementError(f"`{name}` has {host.ndim} axes, `axes` names {len(names)}")
        length = {"row": self.rows, "col": self.cols, None: 1}
        for axis in names:
            if axis not in length:
                raise PlacementError(f"`{name}`: `axes` may hold 'row', 'col' and None, got {show(axis)}")
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
        kind : {"inject", "stream", "control", "probe"}
            Account in the ledger.

        Raises
        ------
        PlacementError
            If the array has another shape or element type: nothing is converted.
        SramStateError
            If the tensor was freed.
        RouteError
            If the account is not one of those, or the routes need too many colors.
        """
        self._check_edge(tensor, kind, ("inject", "stream", "control", "probe"))
        if array is None and not self.is_dry:
            raise PlacementError(f"`{tensor.name}`: only the `dry` executor brings in a tensor without values")
        if array is not None and (array.shape != tensor.shape or array.dtype != tensor.dtype):
            raise PlacementError(
                f"`{tensor.name}` {tensor.shape} {tensor.dtype} cannot take an array of shape {array.shape} and type {array.dtype}"
            )
        place = tensor.placement
        event = _injected(kind, tensor.name, place, tensor.dtype.itemsize // _WORD)
        if self.cores is None:
            self.record(event)
            if tensor.data is not None:
                assert array is not None
                to_panels(array.reshape(place.shape), place, tensor.data)
                tensor.settle()
            return
        assert array is not None
        self.check_routes(event)
        traffic = self.cores.traffic()
        host = array.reshape(place.shape)
        for (row, col), block in tensor.held.items():
            i0, i1, j0, j1 = place.ranges(row, col)
            self.cores.from_edge(traffic, host[i0:i1, j0:j1], col, [block])
        self.record(traffic.event(kind, tensor.name, costs.COLORS[kind]))

    @in_turn
    def drain(self, tensor: PlacedTensor, *, kind: str = "drain") -> NDArray[Any]:
        """Take a tensor out at the north edge; replicas leave once.

        Parameters
        ----------
        tensor : PlacedTensor
        kind : {"drain", "control", "probe"}
            Account in the ledger.

        Returns
        -------
        ndarray
            Whole tensor; with the ``dry`` executor, zeros.

        Raises
        ------
        SramStateError
            If the tensor was freed.
        RouteError
            If the account is not one of those, or the routes need too many colors.
        UninitializedReadError
            If an element was never written (isolated and interpreted executors).
        """
        self._check_edge(tensor, kind, ("drain", "control", "probe"))
        place = tensor.placement
        whole = np.zeros(place.shape, tensor.dtype)
        rows, cols = self._once(place.split_of("row"), self.rows), self._once(place.split_of("col"), self.cols)
        words, factor = np.zeros(self.rows, np.int64), np.zeros(self.cols, np.int64)
        words[rows] = place.row_factor[rows] * (tensor.dtype.itemsize // _WORD)
        factor[cols] = place.col_factor[cols]
        event = costs.edge(kind, tensor.name, words, factor)
        if self.cores is None:
            self.record(event)
            if tensor.data is not None:
                from_panels(tensor.data, place, whole)
        else:
            self.check_routes(event)
            traffic = self.cores.traffic()
            for row in rows.tolist():
                for col in cols.tolist():
                    block = tensor.held.get((row, col))
                    if block is not None:
                        i0, i1, j0, j1 = place.ranges(row, col)
                        whole[i0:i1, j0:j1] = self.cores.to_edge(traffic, block).reshape(i1 - i0, j1 - j0)
            self.record(traffic.event(kind, tensor.name, costs.COLORS[kind]))
        return whole.reshape(tensor.shape)

    def _check_edge(self, tensor: PlacedTensor, kind: str, kinds: tuple[str, ...]) -> None:
        tensor.check_placed(self)
        if kind not in kinds:
            raise RouteError(f"`{tensor.name}`: `kind` must be one of {', '.join(kinds)}, got {kind!r}")

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
            If an argument is missing, unknown or of the wrong kind, a result has replicas that would come to differ, or the body does not
            compile or raises.
        SramStateError
            If a tensor was freed.
        SramOverflowError
            If the kernel's code or its scratch does not fit.
        UninitializedReadError
            If a core would read what nothing wrote (isolated and interpreted executors).
        """
        args, tensors = self._check_args(kernel, args)
        kernel.check_body()
        plan = self._plan(kernel, args, tensors)
        program = plan, *(args[name] for name in kernel.scratch)
        events = self.known_events(program)
        try:
            if events is None:
                with self.first_run(program):
                    self._launch_whole(kernel, args, plan)
            else:
                if not self.is_dry:
                    self._launch_batched(kernel, args, plan)
                self.ledger.extend(events)
        except COMPILE_ERRORS as error:
            raise kernel.does_not_compile(error) from error

    def _launch_whole(self, kernel: Kernel, args: dict[str, Any], plan: _LaunchPlan) -> None:
        """Hold code and scratch, run the cores, and write down that they ran."""
        with self.sram.code(kernel.name, kernel.code_bytes):
            reserved = self._reserve_scratch(kernel, args)
            try:
                macs = plan.macs
                if self.cores is not None:
                    macs = self._launch_isolated(kernel, args, plan)
                elif not self.is_dry:
                    self._launch_batched(kernel, args, plan)
            finally:
                for reservation in reserved:
                    self.sram.free(reservation)
        self.record(plan.event(kernel, macs))

    @in_turn
    def account(self, kernel: Kernel, **args: Any) -> None:
        """Write a launch in the ledger whose work a fused driver does elsewhere; arguments as for `launch`."""
        plan = self._plan(kernel, *self._check_args(kernel, args))
        events = self.known_events(plan)
        if events is not None:
            self.ledger.extend(events)
            return
        with self.first_run(plan):
            with self.sram.code(kernel.name, kernel.code_bytes):
                pass
            self.record(plan.event(kernel, plan.macs))

    def _check_args(self, kernel: Kernel, args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, PlacedTensor]]:
        """All arguments, defaults among them, and those that are tensors."""
        if not isinstance(kernel, Kernel):
            raise KernelError(f"`launch` takes a kernel, got {kernel!r}; declare the function with @wse.kernel(out=(...))")
        if kernel.defaults:
            args = {**kernel.defaults, **args}
        if set(args) != set(kernel.params):
            wrong = [("missing", set(kernel.params) - set(args)), ("unknown", set(args) - set(kernel.params))]
            said = "; ".join(f"{word} {', '.join(f'`{name}`' for name in sorted(names))}" for word, names in wrong if names)
            raise KernelError(f"kernel `{kernel.name}` takes {', '.join(f'`{name}`' for name in kernel.params)}: {said}")
        tensors: dict[str, PlacedTensor] = {}
        for name, arg in args.items():
            if isinstance(arg, PlacedTensor):
                if arg.wafer is not self:
                    raise KernelError(f"kernel `{kernel.name}`: `{name}` lies on another wafer")
                if name in kernel.scratch:
                    raise KernelError(f"kernel `{kernel.name}`: `{name}` must be a scratch request (`wse.scratch`), got a placed tensor")
                arg.check_placed(self)
                tensors[name] = arg
            elif (name in kernel.scratch) != isinstance(arg, Scratch):
                raise KernelError(f"kernel `{kernel.name}`: `{name}` must {'' if name in kernel.scratch else 'not '}be a scratch request")
            elif not isinstance(arg, Scratch):
                _check_scalar(kernel, name, arg)
        if not tensors:
            raise KernelError(f"kernel `{kernel.name}`: no argument is a placed tensor")
        for name in (*kernel.out, *kernel.inout):
            if name not in tensors:
                raise KernelError(f"kernel `{kernel.name}`: `{name}` is written, so it must be a placed tensor")
            for other, tensor in tensors.items():
                if other != name and tensor is tensors[name]:
                    raise KernelError(f"kernel `{kernel.name}`: `{name}` is written, so the same tensor cannot be `{other}` too")
        return args, tensors

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
        if any(0 in tensor.placement.shape for tensor in tensors.values()):  # no core has a block of it
            used_rows, used_cols = used_rows[:0], used_cols[:0]
        rows, cols = _different(splits["row"], used_rows), _different(splits["col"], used_cols)
        if used_rows.size and used_cols.size:
            self._check_replicas(kernel, tensors, "row", used_rows, rows)
            self._check_replicas(kernel, tensors, "col", used_cols, cols)
        macs = 0
        if kernel.macs is not None:
            for row, n_rows in _classes([s.sizes for s in splits["row"]], used_rows):
                for col, n_cols in _classes([s.sizes for s in splits["col"]], used_cols):
                    shapes: dict[str, Any] = {n: t.block_shape(row, col) for n, t in tensors.items()}
                    shapes.update({n: a for n, a in args.items() if n not in tensors})
                    macs += kernel.count(shapes) * n_rows * n_cols
        return _LaunchPlan(rows, cols, used_rows, used_cols, macs)

    def _check_replicas(self, kernel: Kernel, tensors: dict[str, PlacedTensor], axis: GridAxis, used: Ints, runs: Ints) -> None:
        """Raise if replicas of a written tensor could come to differ: each must be written, from the same blocks."""
        n = self.rows if axis == "row" else self.cols
        is_used = np.zeros(n, np.bool_)
        is_used[used] = True
        lines = "rows" if axis == "row" else "columns"
        for name in (*kernel.out, *kernel.inout):
            split = tensors[name].placement.split_of(axis)
            labels = np.zeros(n, np.int64) if split is None else split.labels
            copies = np.bincount(labels[labels >= 0], minlength=n)
            written = np.bincount(labels[used], minlength=n)
            if copies.max() == 1 or not written.any():
                continue
            left_out = np.flatnonzero((labels >= 0) & ~is_used & (written[labels] > 0))
            if left_out.size:
                raise KernelError(
                    f"kernel `{kernel.name}`: `{name}` has replicas on several {lines}, but nothing runs on {axis} {int(left_out[0])}, "
                    f"where another argument has no block; the replicas would differ. Place `{name}` only where the kernel runs, and "
                    f"broadcast it"
                )
            if kernel.takes_core and (written > 1).any():
                raise KernelError(
                    f"kernel `{kernel.name}` takes `core` and writes `{name}`, which has replicas on several {lines}; they would differ. "
                    f"Split `{name}` over {lines}"
                )
            ran = np.bincount(labels[runs], minlength=n)
            if (ran > 1).any():
                for other, tensor in tensors.items():
                    theirs = tensor.placement.split_of(axis)
                    if theirs is not None and _different([theirs], used).size > np.count_nonzero(written):
                        raise KernelError(
                            f"kernel `{kernel.name}`: `{name}` has replicas on several {lines}, but `{other}` differs there; the replicas "
                            f"would differ. Split `{name}` over {lines} as `{other}` is, and combine it with a move"
                        )
                raise KernelError(f"kernel `{kernel.name}`: `{name}` has replicas on several {lines}, where other arguments differ")

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
                data = arg.flat if kernel.guarded else arg.unsettled
                if kernel.guarded and name not in kernel.out and name not in kernel.inout:
                    data = data.view()
                    data.flags.writeable = False
                values += [data, arg.placement.table]
            elif isinstance(arg, Scratch):
                kinds.append("w" if len(arg.shape) == 2 else "v")
                values.append(np.empty((plan.rows.size * plan.cols.size, *arg.shape), arg.dtype))
            else:
                kinds.append("s")
                values.append(arg)
        driver = make_driver(kernel.body, "".join(kinds), takes_core=kernel.takes_core)
        units = plan.macs + sum(value.size for value in values if isinstance(value, np.ndarray))
        places = (plan.rows, plan.cols, self.rows, self.cols)
        if kernel.guarded:  # a stranger's body may fail: it does so here
            kernel.vet(driver.function, kernel.body, (0, 1, *places, *values))
            try:
                driver(units, *places, *values)
            except Exception as error:
                if isinstance(error, COMPILE_ERRORS):
                    raise
                raise kernel.failed(error) from error
        else:
            self.pending.run(driver, units, *places, *values)
        for name in (*kernel.out, *kernel.inout):
            args[name].settle()

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


def _check_scalar(kernel: Kernel, name: str, arg: object) -> None:
    if isinstance(arg, (bool, np.bool_)) or (isinstance(arg, np.number) and arg.dtype.kind in "fiu"):
        return
    if isinstance(arg, int):
        if not -(2**63) <= arg < 2**63:
            raise KernelError(f"kernel `{kernel.name}`: `{name}` must fit 64 bits, got {arg}")
        return
    raise KernelError(
        f"kernel `{kernel.name}`: `{name}` must be a placed tensor or a typed scalar, got {type(arg).__name__}; "
        f"place the array, or write np.float32(...)"
    )


def _all_used(splits: list[Split], n: int) -> Ints:
    used = np.ones(n, np.bool_)
    for split in splits:
        used &= split.sizes > 0
    return np.flatnonzero(used)


def _different(splits: list[Split], used: Ints) -> Ints:
    """First of the positions in `used` for every combination of ranges that the splits have there."""
    if not splits or not used.size:
        return used[:1]
    if len(splits) == 1:
        _, first = np.unique(splits[0].labels[used], return_index=True)
    else:
        _, first = np.unique(np.stack([s.labels[used] for s in splits]), axis=1, return_index=True)
    kept: Ints = used[np.sort(first)]
    return kept


def _classes(sizes: list[Ints], used: Ints) -> list[tuple[int, int]]:
    """(a position, how many are like it) for positions in `used` that agree in all `sizes`."""
    if not used.size:
        return []
    if not sizes:
        return [(int(used[0]), int(used.size))]
    _, first, counts = np.unique(np.stack([s[used] for s in sizes]), axis=1, return_index=True, return_counts=True)
    return [(int(used[f]), int(n)) for f, n in zip(first, counts, strict=True)]


def to_panels(whole: NDArray[Any], place: Placement, flat: NDArray[Any]) -> None:
    """Write an (m, n) array into the flat buffer of a placed tensor."""
    for start, stop in _panels(place):
        flat[place.shape[0] * start : place.shape[0] * stop].reshape(place.shape[0], stop - start)[...] = whole[:, start:stop]


def from_panels(flat: NDArray[Any], place: Placement, whole: NDArray[Any]) -> None:
    """Inverse of `to_panels`."""
    for start, stop in _panels(place):
        whole[:, start:stop] = flat[place.shape[0] * start : place.shape[0] * stop].reshape(place.shape[0], stop - start)


@lru_cache(maxsize=1024)
def _injected(kind: str, name: str, place: Placement, n_words: int) -> Event:
    """What bringing in a tensor of `n_words` words an element comes to."""
    return costs.edge(kind, name, place.row_factor * n_words, place.col_factor)


def _panels(place: Placement) -> list[tuple[int, int]]:
    grid, split = place.axis1
    if grid is None or place.shape[0] == 1:
        return [(0, place.shape[1])]
    return [(int(split.starts[i]), int(split.stops[i])) for i in split.representatives]


def _element_type(name: str, dtype: DTypeLike) -> np.dtype[Any]:
    """`dtype`, if cores can hold it and the fabric can carry it."""
    found = np.dtype(dtype)
    if found.kind not in "fiu" or found.itemsize not in (_WORD, 2 * _WORD) or not found.isnative:
        raise PlacementError(
            f"`{name}`: elements must be integers or floating point numbers that fill one or two 32-bit words, got {found}; "
            f"convert to float32 or int32"
        )
    return found
