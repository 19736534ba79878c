"""What one core runs: a kernel is one function body with its contract (outputs, scratch, code size)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from linecache import getline
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from wse_emu.foundation.errors import KernelError
from wse_kernels.core import Core
from wse_kernels.fma import count_fma

__all__ = ["Core", "Kernel", "Scratch", "kernel", "scratch"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Scratch:
    """Per-core working memory of a launch, charged to SRAM while the kernel runs."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def scratch(shape: tuple[int, ...] | int, dtype: DTypeLike = np.float32) -> Scratch:
    """Ask for uninitialised working memory of `shape` on every core of a launch.

    Parameters
    ----------
    shape : int or tuple of int
        Per-core shape, one or two axes.
    dtype : dtype, default float32
        Element type.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(shape) <= 2 or any(n < 0 for n in shape):
        raise KernelError(f"scratch has one or two axes of non-negative length, got {shape}")
    return Scratch(shape, np.dtype(dtype))


@dataclass(frozen=True, eq=False)
class Kernel:
    """One core's function and its contract; `kernel` makes one from a plain function."""

    body: Callable[..., None]
    """Compiled (or plain) function on this core's blocks."""
    params: tuple[str, ...]
    """Parameter names without a leading ``core``."""
    out: tuple[str, ...] = ()
    """Arrays it writes without reading."""
    inout: tuple[str, ...] = ()
    """Arrays it reads and writes."""
    scratch: tuple[str, ...] = ()
    """Working memory, undefined before and after."""
    code_bytes: int = 0
    """Declared size of its code in SRAM."""
    takes_core: bool = False
    macs: Callable[[Mapping[str, Any]], int] | None = field(default=None)
    """Multiply-adds of one run from the blocks' shapes (and scalars); None counts none."""

    def __post_init__(self) -> None:
        known = set(self.params)
        for role in ("out", "inout", "scratch"):
            unknown = set(getattr(self, role)) - known
            if unknown:
                raise KernelError(f"kernel `{self.name}`: `{role}` names {sorted(unknown)}, which are not parameters {list(self.params)}")
        if not (self.out or self.inout):
            raise KernelError(f"kernel `{self.name}` writes nothing: name its results in `out`")
        if self.code_bytes < 0:
            raise KernelError(f"kernel `{self.name}`: `code_bytes` must be >= 0, got {self.code_bytes}")

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.body, "__name__", "kernel"))

    @cached_property
    def python(self) -> Callable[..., None]:
        """The same body as plain Python."""
        return getattr(self.body, "py_func", self.body)

    @cached_property
    def checked(self) -> Callable[..., None]:
        """The compiled body with every index checked: a core that runs alone cannot reach past its blocks."""
        from wse_kernels._jit import kernel as jit  # noqa: PLC0415 - Numba loads when a core first runs

        return jit(boundscheck=True)(self.python)

    def does_not_compile(self, error: Exception) -> KernelError:
        """What the compiler's many lines come to: the reason, and the line of the body if they name one."""
        text = str(error)
        code = self.python.__code__
        numbers = {number for *_, number in code.co_lines() if number is not None}
        named = [int(n) for n in re.findall(rf"{re.escape(Path(code.co_filename).name)}(?:\", line | \()(\d+)", text)]
        at = [n for n in named if n in numbers and n != code.co_firstlineno]
        where = f" ({Path(code.co_filename).name}, line {at[-1]}: `{getline(code.co_filename, at[-1]).strip()}`)" if at else ""
        if "NRT required" in text or "Only accept returning of array passed" in text:
            reason = "it allocates memory; a body has its blocks, its scratch and scalars, and stores element by element"
        else:
            lines = (line.strip() for line in text.splitlines())
            reason = next((line for line in lines if line and not line.startswith("Failed in nopython mode")), type(error).__name__)
            reason = reason.removesuffix(". Raised from None").rstrip(".:")
        return KernelError(f"kernel `{self.name}` does not compile{where}: {reason}")

    def run(self, values: Sequence[Any], shapes: Mapping[str, Any], *, interpreted: bool) -> int:
        """Run the body once, its indices checked; returns its multiply-adds, counted in the interpreter or taken from `macs`."""
        if not interpreted:
            self.checked(*values)
            return self.macs(shapes) if self.macs else 0
        with count_fma() as counter, np.errstate(all="ignore"):
            self.python(*values)
        return counter.n


def kernel(
    *,
    out: Sequence[str] = (),
    inout: Sequence[str] = (),
    scratch: Sequence[str] = (),
    code_bytes: int = 0,
    macs: Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[[Callable[..., None]], Kernel]:
    """Declare a function as a kernel: what one core does with its own blocks.

    Parameters
    ----------
    out, inout, scratch : sequence of str
        Parameters that are written, read and written, and working memory; every other array is read-only.
    code_bytes : int
        Size of the code in SRAM, in bytes, charged while the kernel runs.
    macs : callable, optional
        Maps the blocks' shapes by parameter name to the multiply-adds of one run, for the ledger.

    Returns
    -------
    callable
        Decorator that gives a `Kernel` for `Wafer.launch`. The first parameter may be ``core``: a NamedTuple
        ``(row, col, n_rows, n_cols)``. The body is compiled when first launched; it may neither allocate nor raise. The ``batched``
        executor does not check indices; ``isolated`` and ``interpreted`` do.

    Raises
    ------
    KernelError
        If a name is not a parameter, or nothing is written.
    """

    def declare(function: Callable[..., None]) -> Kernel:
        from wse_kernels._jit import kernel as jit  # noqa: PLC0415 - Numba loads when the first kernel is declared

        params = tuple(inspect.signature(function).parameters)
        takes_core = bool(params) and params[0] == "core"
        return Kernel(
            body=jit(cache=False)(function),
            params=params[1:] if takes_core else params,
            out=tuple(out),
            inout=tuple(inout),
            scratch=tuple(scratch),
            code_bytes=code_bytes,
            takes_core=takes_core,
            macs=macs,
        )

    return declare
