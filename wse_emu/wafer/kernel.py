"""What one core runs: a kernel is one function body with its contract (outputs, scratch, code size)."""

from __future__ import annotations

import dis
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

from wse_emu.foundation.arguments import check_callable, show
from wse_emu.foundation.errors import KernelError
from wse_kernels.core import Core
from wse_kernels.fma import count_fma

__all__ = ["Core", "Kernel", "Scratch", "kernel", "scratch"]

_WIDEST = 8
_DEEP = (np.ndarray, list, dict, set, bytearray)
"""What a body may not find outside of its arguments: memory that no core holds."""


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


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
    axes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not 1 <= len(axes) <= 2 or not all(_is_integer(n) and n >= 0 for n in axes):
        raise KernelError(f"scratch has one or two axes of non-negative length, got {show(shape)}")
    try:
        element = np.dtype(dtype)
    except TypeError as error:
        raise KernelError(f"scratch has elements of a NumPy type, got {show(dtype)}") from error
    if element.kind not in "biuf" or element.itemsize > _WIDEST or not element.isnative:
        raise KernelError(f"scratch holds numbers of at most {_WIDEST} bytes, got {element}")
    return Scratch(tuple(int(n) for n in axes), element)


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

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that a launch may leave out."""
    guarded: bool = False
    """Whether the body is a stranger's: what it reads is handed over read-only, and what it was compiled to is looked at."""
    _vetted: set[Any] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        known = set(self.params)
        roles: dict[str, str] = {}
        for role in ("out", "inout", "scratch"):
            for name in getattr(self, role):
                if name not in known:
                    raise KernelError(f"kernel `{self.name}`: `{role}` names {show(name)}, which is no parameter {list(self.params)}")
                if name in roles:
                    raise KernelError(f"kernel `{self.name}`: `{name}` is named in `{roles[name]}` and in `{role}`; it has one role")
                roles[name] = role
        if not (self.out or self.inout):
            raise KernelError(f"kernel `{self.name}` writes nothing: name its results in `out`")
        if not _is_integer(self.code_bytes) or self.code_bytes < 0:
            raise KernelError(f"kernel `{self.name}`: `code_bytes` must be an integer >= 0, got {show(self.code_bytes)}")
        check_callable("macs", self.macs, KernelError)

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
        if "readonly array" in text:
            reason = "it writes to an argument that is read-only; name it in `out` or `inout`"
        elif "Only accept returning of array passed" in text:
            reason = "it returns an array; a body stores its results in the arguments named in `out`"
        elif "NRT required" in text:
            reason = "it allocates memory; a body has its blocks, its scratch and scalars, and stores element by element"
        else:
            lines = (line.strip() for line in text.splitlines())
            reason = next((line for line in lines if line and not line.startswith("Failed in nopython mode")), type(error).__name__)
            reason = reason.removesuffix(". Raised from None").rstrip(".:")
        return KernelError(f"kernel `{self.name}` does not compile{where}: {reason}")

    def count(self, shapes: Mapping[str, Any]) -> int:
        """Multiply-adds of one run by `macs`.

        Raises
        ------
        KernelError
            If `macs` does not give a number of them.
        """
        if self.macs is None:
            return 0
        try:
            n = self.macs(shapes)
        except Exception as error:
            raise KernelError(f"kernel `{self.name}`: `macs` failed on {dict(shapes)}: {type(error).__name__}: {error}") from error
        if not _is_integer(n) or n < 0:
            raise KernelError(f"kernel `{self.name}`: `macs` must give an integer >= 0, got {show(n)}")
        return int(n)

    def run(self, values: Sequence[Any], shapes: Mapping[str, Any], *, interpreted: bool) -> int:
        """Run the body once, its indices checked; returns its multiply-adds, counted in the interpreter or taken from `macs`."""
        if not interpreted:
            if self.guarded:
                self.vet(self.checked, self.checked, values)
            self.checked(*values)
            return self.count(shapes)
        with count_fma() as counter, np.errstate(all="ignore"):
            result = self.python(*values)
        if result is not None:
            raise self.returns(type(result).__name__)
        return counter.n

    def returns(self, what: str) -> KernelError:
        """What a body that returns something is told."""
        return KernelError(f"kernel `{self.name}` returns {what}; a body stores its results in the arguments named in `out`")

    def failed(self, error: Exception, where: str = "") -> KernelError:
        """What an exception of a body comes to."""
        if "read-only" in str(error):
            return KernelError(f"kernel `{self.name}`{where} writes to an argument that is read-only: name it in `out` or `inout`")
        return KernelError(f"kernel `{self.name}`{where}: {type(error).__name__}: {error}")

    def check_body(self) -> None:
        """Raise if the body would use memory that no core holds: arrays, lists and the like from outside of its arguments.

        Raises
        ------
        KernelError
        """
        if not self.guarded or "body" in self._vetted:
            return
        found = inspect.getclosurevars(self.python)
        read = {i.argval for i in dis.get_instructions(self.python) if i.opname in ("LOAD_GLOBAL", "LOAD_DEREF")}
        for name, value in {**found.globals, **found.nonlocals}.items():
            if name in read and isinstance(value, _DEEP):
                raise KernelError(
                    f"kernel `{self.name}`: `{name}` is memory from outside ({type(value).__name__}), which lies on no core; "
                    f"place it and pass it as an argument"
                )
        self._vetted.add("body")

    def vet(self, compiled: Any, body: Any, values: Sequence[Any]) -> None:
        """Compile `compiled` for these values, without running it, and look at what `body` came to.

        Raises
        ------
        KernelError
            If the body returns something, or computes in double precision where plain Python would not: the executors would disagree.
        """
        if not hasattr(compiled, "overloads"):  # NUMBA_DISABLE_JIT
            return
        from wse_kernels._jit import type_of  # noqa: PLC0415 - Numba loads when a core first runs

        compiled.compile(tuple(type_of(value) for value in values))
        for signature, result in body.overloads.items():
            key = (id(body), signature)
            if key not in self._vetted:
                self._look_at(result)
                self._vetted.add(key)

    def _look_at(self, result: Any) -> None:
        from wse_kernels._jit import promotions  # noqa: PLC0415

        returned = str(result.signature.return_type)
        if returned != "none":
            raise self.returns("an array" if returned.startswith(("Array", "array")) else returned)
        for line, what in promotions(result):
            code = self.python.__code__
            text = getline(code.co_filename, line).strip()
            raise KernelError(
                f"kernel `{self.name}` ({Path(code.co_filename).name}, line {line}: `{text}`): {what}, which compiled code computes in "
                f"float64 and plain Python in float32; write np.float32(...), or np.float64(...) for both"
            )


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
        ``(row, col, n_rows, n_cols)``; other parameters may have defaults. The body is compiled when first launched. It stores every result
        in an argument, allocates nothing, returns nothing, and uses no array from outside; numbers from outside are frozen when it is
        compiled. What it raises becomes a `KernelError`; cores that had run by then have written. The ``batched`` executor does not check
        indices; ``isolated`` and ``interpreted`` do. Products and sums of a float32 with a Python number are refused where they are
        compiled: write ``np.float32(0.1)``. `wse_kernels.exp` has the same bits everywhere; ``np.exp`` and its like have not.

    Raises
    ------
    KernelError
        If a name is not a parameter or has two roles, nothing is written, or the function is not a plain one.
    """

    def declare(function: Callable[..., None]) -> Kernel:
        from wse_kernels._jit import kernel as jit  # noqa: PLC0415 - Numba loads when the first kernel is declared

        if not inspect.isfunction(function) or inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise KernelError(f"a kernel is a plain Python function, got {show(function)}")
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                raise KernelError(
                    f"kernel `{function.__name__}`: `{parameter}` has no one value; a kernel's parameters are all named and plain"
                )
            if name == "core" and parameter is not next(iter(parameters.values())):
                raise KernelError(f"kernel `{function.__name__}`: `core` comes first or not at all")
        params = tuple(parameters)
        takes_core = bool(params) and params[0] == "core"
        return Kernel(
            body=jit(cache=False)(function),
            params=params[1:] if takes_core else params,
            out=_names(function, "out", out),
            inout=_names(function, "inout", inout),
            scratch=_names(function, "scratch", scratch),
            code_bytes=code_bytes,
            takes_core=takes_core,
            macs=macs,
            defaults={name: p.default for name, p in parameters.items() if p.default is not p.empty},
            guarded=True,
        )

    return declare


def _names(function: Callable[..., None], role: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise KernelError(f'kernel `{function.__name__}`: `{role}` is a sequence of names, for instance ("y",); got {show(names)}')
    return tuple(names)
