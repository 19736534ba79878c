"""Spread a core's body over all cores of a launch: one compiled loop per body, run in parts.

The driver reads the blocks' places from the tables of `wse_emu`'s placements: ``[m, mode0, mode1, at0, at1, starts0, stops0, starts1,
stops1]`` with mode 0 whole, 1 indexed by row, 2 by column; a block starts at ``m * j0 + i0 * (j1 - j0)`` of its flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.core import Core
from wse_kernels.threads import Driver


@kernel()
def locate(table: NDArray[np.int64], row: int, col: int) -> tuple[int, int, int]:
    """Offset, rows and columns of the block of core (row, col)."""
    at0, at1 = table[3], table[4]
    n0 = (at1 - at0) // 2
    n1 = (table.shape[0] - at1) // 2
    p0 = 0
    if table[1] == 1:
        p0 = row
    elif table[1] == 2:
        p0 = col
    p1 = 0
    if table[2] == 1:
        p1 = row
    elif table[2] == 2:
        p1 = col
    i0, i1 = table[at0 + p0], table[at0 + n0 + p0]
    j0, j1 = table[at1 + p1], table[at1 + n1 + p1]
    return table[0] * j0 + i0 * (j1 - j0), i1 - i0, j1 - j0


_drivers: dict[tuple[Callable[..., None], str, bool], Driver] = {}


def make_driver(body: Callable[..., None], kinds: str, *, takes_core: bool) -> Driver:
    """Compile-on-first-use driver that runs `body` once for every listed row and column of cores.

    Parameters
    ----------
    body : callable
        A kernel body on blocks.
    kinds : str
        One character per parameter: ``"1"`` or ``"2"`` an array with that many axes, ``"w"`` scratch of two axes, ``"v"`` of one, ``"s"`` a
        scalar.
    takes_core : bool
        Whether the body's first parameter is a `Core`.

    Returns
    -------
    Driver
        ``driver(units, rows, cols, n_rows, n_cols, *args)`` with a flat buffer and a table for each array, a ``(n_tasks, ...)`` array for
        scratch, and scalars as they are.
    """
    known = _drivers.get((body, kinds, takes_core))
    # Of two threads that make the same driver at once, both get the first one's.
    return known or _drivers.setdefault((body, kinds, takes_core), _make_driver(body, kinds, takes_core))


def _make_driver(body: Callable[..., None], kinds: str, takes_core: bool) -> Driver:
    params: list[str] = []
    before: list[str] = []
    values: list[str] = ["Core(row, col, n_rows, n_cols)"] if takes_core else []
    for i, kind in enumerate(kinds):
        if kind == "s":
            params.append(f"s{i}")
            values.append(f"s{i}")
        elif kind in "wv":
            params.append(f"w{i}")
            values.append(f"w{i}[task]")
        else:
            params += [f"b{i}", f"t{i}"]
            before.append(f"o{i}, m{i}, n{i} = locate(t{i}, row, col)")
            block = f"b{i}[o{i} : o{i} + m{i} * n{i}]"
            values.append(block if kind == "1" else f"{block}.reshape((m{i}, n{i}))")
    source = "\n".join(
        [
            f"def driver(part, n_parts, rows, cols, n_rows, n_cols, {', '.join(params)}):",
            "    n_tasks = rows.shape[0] * cols.shape[0]",
            "    for task in range(part * n_tasks // n_parts, (part + 1) * n_tasks // n_parts):",
            "        row = rows[task % rows.shape[0]]",
            "        col = cols[task // rows.shape[0]]",
            *(f"        {line}" for line in before),
            f"        body({', '.join(values)})",
        ]
    )
    scope: dict[str, Any] = {"locate": locate, "body": body, "Core": Core, "__name__": __name__}
    exec(compile(source, __file__, "exec"), scope)  # the text above, made from `kinds` alone
    driver: Callable[..., None] = scope["driver"]
    plain = getattr(body, "py_func", body)
    driver.__qualname__ = f"driver[{plain.__module__}.{plain.__qualname__}, {kinds}]"
    return Driver(kernel(driver=True, cache=plain.__module__.startswith("wse_kernels."))(driver))
