"""The one decorator of all kernels: every compiler flag in one place, and a disk cache that cannot go stale.

`kernel` compiles a function; `helper` marks one that runs as its caller runs: compiled inside a compiled kernel, as plain Python elsewhere.
"""

from __future__ import annotations

import operator
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.core import compiler, config, ir, serialize, sigutils
from numba.core.caching import NullCache
from numba.core.errors import NumbaError, UnsupportedBytecodeError
from numba.extending import is_jitted, register_jitable

from wse_kernels import _cache

F = TypeVar("F", bound=Callable[..., Any])

# Numba's own functions that carry no types.
_RESULT: Any = compiler.CompileResult
_dumps: Any = serialize.dumps
_normalize: Any = sigutils.normalize_signature
_unliteral: Any = types.unliteral
type_of: Callable[[Any], Any] = cast(Any, numba).typeof

_KERNELS = "wse_kernels"
_COVERED = (_KERNELS, "wse_emu")
"""Packages whose sources are part of the key; functions from anywhere else are never kept on disk."""

_FIXED = (*_COVERED, "numba", "numpy", "builtins", "math")
"""Packages whose modules and classes are told by their names: covered, or their version is part of the stamp."""

# What else changes the code that Numba emits. CPU name and features are asked of the code generator.
_CODEGEN_OPTIONS = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "DISABLE_INTEL_SVML", "DEBUGINFO_DEFAULT")

COMPILE_ERRORS: tuple[type[Exception], ...] = (NumbaError, UnsupportedBytecodeError)
"""What the compiler raises where a body asks for what it cannot have."""


class CompileRecord(NamedTuple):
    """One specialisation that this process made ready."""

    function: str
    """Module and qualified name."""
    signature: str
    driver: bool
    loaded: bool
    """True if it came from the disk cache, False if it was compiled."""


class CompileCount(NamedTuple):
    """Number of specialisations that this process made ready."""

    compiled: int
    compiled_drivers: int
    """Of those compiled, the drivers."""
    loaded: int
    loaded_drivers: int
    """Of those loaded from disk, the drivers."""

    @property
    def drivers(self) -> int:
        """Parallel specialisations, compiled or loaded: what a cold start would have to compile."""
        return self.compiled_drivers + self.loaded_drivers


_log: list[CompileRecord] = []


def compile_log() -> tuple[CompileRecord, ...]:
    """Return every specialisation that this process compiled or loaded, in order."""
    return tuple(_log)


def compile_count() -> CompileCount:
    """Count the specialisations that this process compiled and those it loaded from disk (helpers are part of their callers)."""
    compiled = [record for record in _log if not record.loaded]
    loaded = [record for record in _log if record.loaded]
    return CompileCount(len(compiled), sum(r.driver for r in compiled), len(loaded), sum(r.driver for r in loaded))


def kernel(*, driver: bool = False, cache: bool = True, boundscheck: bool = False) -> Callable[[F], F]:
    """Compile a function with the flags of the house.

    No fastmath, NumPy's error model (a division by zero gives inf or NaN), and, except in drivers, no allocation: a body that allocates
    does not compile. The result has the function's own type for checkers; `plain` gives back the function itself, and so does its attribute
    ``py_func``. With ``NUMBA_DISABLE_JIT=1`` the function stays plain Python.

    Parameters
    ----------
    driver : bool
        May allocate, and runs without Python's lock: for the functions that a `wse_kernels.threads.Driver` calls.
    cache : bool
        Keep the compiled code on disk. Only functions from source files of `wse_kernels` or `wse_emu` are ever kept, for only their sources
        are part of the key; a function made by `exec` or in a closure is kept if what it holds can be named (numbers, strings, kernels that
        are kept themselves). All others are compiled anew in every process.
    boundscheck : bool
        Raise ``IndexError`` for an index outside of an array; the results of a sound function are the same bits.

    Returns
    -------
    callable
        The decorator.
    """
    flags: dict[str, Any] = {"error_model": "numpy", "nogil": driver, "boundscheck": boundscheck}
    if not driver:
        flags["_nrt"] = False

    def decorate(function: F) -> F:
        compiled: Any = numba.njit(**flags)(function)
        if compiled is function:  # NUMBA_DISABLE_JIT
            function.__dict__["py_func"] = function
        else:
            compiled._cache = _KernelCache(cast(FunctionType, function), driver=driver, keep=cache, boundscheck=boundscheck)
        return cast(F, compiled)

    return decorate


def helper(function: F) -> F:
    """Mark a function that kernels call: compiled into a compiled kernel, plain Python when called from plain Python.

    A `kernel` that is called from Python returns Python's numbers; a helper returns NumPy scalars of the stated type, so that an
    interpreted body computes what the compiled one does.
    """
    register_jitable(error_model="numpy", _nrt=False)(function)
    return function


def plain(function: F) -> F:
    """Return the plain Python function of a kernel (of anything else, the function itself)."""
    return cast(F, getattr(function, "py_func", function))


def promotions(result: Any) -> Iterator[tuple[int, str]]:
    """Lines of a compiled function on which a float32 meets a number of another type, and what it meets.

    Compiled code computes them in float64; in plain Python a Python number takes the type of the float32. Comparisons with a constant that
    float32 holds exactly are the same in both.

    Parameters
    ----------
    result : CompileResult
        One specialisation, compiled in this process (one from the disk cache carries no types).
    """
    notes = result.type_annotation
    blocks = getattr(notes, "blocks", None)
    if blocks is None:
        return
    constants: dict[str, list[Any]] = {}
    for block in blocks.values():
        for assign in block.find_insts(ir.Assign):
            constants.setdefault(assign.target.name, []).append(
                assign.value.value if isinstance(assign.value, (ir.Const, ir.Global, ir.FreeVar)) else None
            )
    for expression, signature in notes.calltypes.items():
        if not isinstance(expression, ir.Expr) or expression.op not in ("binop", "inplace_binop", "call"):
            continue
        names = [v.name for v in (expression.args if expression.op == "call" else (expression.lhs, expression.rhs))]
        found = [_unliteral(notes.typemap[name]) for name in names]
        others = [(n, t) for n, t in zip(names, found, strict=True) if isinstance(t, types.Number) and t != types.float32]
        if types.float32 not in found or not others:
            continue
        name, other = others[0]
        if signature.return_type == types.boolean and expression.op != "call":
            (value, *more) = constants.get(name, [None])
            exact = isinstance(other, types.Integer) or (not more and isinstance(value, float) and float(np.float32(value)) == value)
            if not exact:
                yield expression.loc.line, f"a float32 is compared with {other}"
        elif signature.return_type == types.float64:
            yield expression.loc.line, f"a float32 meets {other}"
        elif expression.op != "call" and expression.fn in (operator.pow, operator.ipow):
            yield expression.loc.line, f"a float32 is raised to a power of {other}"


def _arguments(sig: Any) -> tuple[Any, ...]:
    return tuple(_normalize(sig)[0])


class _Sources:
    """Sources of one covered package: their hash, and whether they still are what this process imported."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._imported = _cache.snapshot(package)
        self._hash: str | None = None

    def hash(self) -> str | None:
        """Return the hash of all sources; None if a file was changed after the package was imported, or there are no files."""
        try:
            found = self._hash or _cache.hash_sources(self.package)
            if not self._imported or _cache.snapshot(self.package) != self._imported:
                return None
        except OSError:
            return None
        self._hash = found
        return found

    def hold(self, function: FunctionType) -> bool:
        """Return whether the function was written in one of these files (and not, say, made by `exec`)."""
        path = Path(os.path.realpath(function.__code__.co_filename))
        return path.is_file() and path.is_relative_to(os.path.realpath(self.package))


_sources: dict[str, _Sources] = {_KERNELS: _Sources(Path(__file__).parent)}


def _sources_of(function: FunctionType) -> _Sources | None:
    """Return the sources that cover a function, or None."""
    root = function.__module__.partition(".")[0]
    if root not in _COVERED:
        return None
    if root not in _sources:
        _sources[root] = _Sources(Path(sys.modules[root].__path__[0]))
    return _sources[root] if _sources[root].hold(function) else None


class _KernelCache(NullCache):
    """Disk cache of one kernel, in the place of Numba's own (attribute ``_cache`` of a dispatcher)."""

    def __init__(self, function: FunctionType, *, driver: bool, keep: bool, boundscheck: bool) -> None:
        self.name = f"{function.__module__}.{function.__qualname__}"
        self._function = function
        self._driver = driver
        self._boundscheck = boundscheck
        self._sources = _sources_of(function) if keep else None

    @property
    def cache_path(self) -> str | None:
        """Return the folder of this kernel's files, None if they are not kept."""
        folder = self._folder()
        return None if folder is None else str(folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled result for a signature from disk, or None."""
        target_context.refresh()
        path = self._path(sig, target_context.codegen())
        payload = None if path is None else _cache.read_entry(path)
        if payload is None:
            return None
        try:
            result = _RESULT._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # whatever is wrong with a cached file, compiling again is right
            return None
        self._record(sig, loaded=True)
        return result

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep a fresh compiled result on disk, if it may be kept and the folder can be written."""
        self._record(sig, loaded=False)
        if cres.library.has_dynamic_globals or any(not lifted.can_cache for lifted in cres.lifted):
            return
        path = self._path(sig, cres.library.codegen)
        if path is not None:
            _cache.write_entry(path, _dumps(cres._reduce()))

    def identity(self) -> str | None:
        """Return text that tells this function from every other one under the same stamp, None if it may not be kept."""
        return None if self._sources is None else _identity(self._function, self._sources)

    def _folder(self) -> Path | None:
        sources = _sources[_KERNELS].hash()
        return None if sources is None or self._sources is None else _cache.kernels_root() / _stamp_of(sources)

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        folder, identity = self._folder(), self.identity()
        arguments = [_describe_type(argument) for argument in _arguments(sig)]
        if folder is None or identity is None or None in arguments:
            return None
        options = [(name, str(getattr(config, name, None))) for name in _CODEGEN_OPTIONS]
        key = repr((identity, self._driver, self._boundscheck, arguments, codegen.magic_tuple(), options))
        return folder / _cache.entry_name(self.name, key)

    def _record(self, sig: Any, *, loaded: bool) -> None:
        signature = f"({', '.join(str(argument) for argument in _arguments(sig))})"
        _log.append(CompileRecord(self.name, signature, self._driver, loaded))


@lru_cache(maxsize=1)
def _stamp_of(sources: str) -> str:
    return _cache.kernels_stamp(sources)


def _identity(function: FunctionType, sources: _Sources) -> str | None:
    """Return text that stands for a covered function and for what is frozen into it beside the sources; None where there is none."""
    code = function.__code__
    parts: list[str | None] = [f"{function.__module__}.{function.__qualname__}:{code.co_firstlineno}"]
    if sources is not _sources[_KERNELS]:  # the others are part of the stamp
        parts.append(sources.hash())
    frozen = [cell.cell_contents for cell in function.__closure__ or ()]
    if function.__globals__ is not vars(sys.modules[function.__module__]):  # made by `exec`: its text and its names are its own
        parts.append(repr((code.co_code, code.co_names, code.co_varnames)))
        frozen += [code.co_consts, *(function.__globals__[name] for name in code.co_names if name in function.__globals__)]
    parts += [_describe_value(value) for value in frozen if plain(value) is not function]  # it may call itself
    return None if None in parts else repr(parts)


def _describe_value(value: Any) -> str | None:
    """Return text that stands for a value frozen into a kernel, None where there is none that tells it from every other."""
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, np.generic):
        return f"{type(value).__name__}:{value!r}"
    if type(value) is tuple:
        parts = [_describe_value(item) for item in value]
        return None if None in parts else f"tuple:{parts}"
    if is_jitted(value):
        cache = getattr(value, "_cache", None)
        return cache.identity() if isinstance(cache, _KernelCache) else None
    if isinstance(value, FunctionType):  # a helper
        sources = _sources_of(value)
        return None if sources is None else _identity(value, sources)
    if isinstance(value, (ModuleType, type)):
        name = value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"
        return f"name:{name}" if name.partition(".")[0] in _FIXED else None
    return None


def _describe_type(numba_type: Any) -> str | None:
    """Return text that tells an argument's type from every other; None for types that are not kept (names of functions hold addresses)."""
    if isinstance(numba_type, types.BaseTuple):
        items: Any = numba_type
        parts = [_describe_type(item) for item in items.types]
        cls = getattr(items, "instance_class", tuple)
        fields = getattr(cls, "_fields", ())
        return None if None in parts else f"{cls.__module__}.{cls.__qualname__}{fields}{parts}"
    if isinstance(numba_type, types.Array):
        return None if _describe_type(numba_type.dtype) is None else f"{type(numba_type).__name__}:{numba_type}"
    if isinstance(numba_type, (types.Number, types.Boolean, types.NoneType, types.Omitted, types.Literal)):
        return f"{type(numba_type).__name__}:{numba_type}"
    return None
