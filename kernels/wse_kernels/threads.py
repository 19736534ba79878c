"""How many threads a parallel driver runs on; and the forked child in which starting them would kill the process."""

from __future__ import annotations

import os
import sys
from typing import Any

import numba

from wse_kernels.errors import ForkError

_threading_layer: Any = vars(numba)["threading_layer"]  # which Numba's types do not name
_lost_in_fork = [False]
"""Whether this process was forked from one that had threads of GNU OpenMP: that library ends the child that uses them."""


def n_threads() -> int:
    """Return the number of threads for a parallel driver; every caller of one asks here first.

    Raises
    ------
    ForkError
        In a process forked from one that had run a parallel driver on GNU OpenMP's threads.
    """
    if _lost_in_fork[0]:
        raise ForkError(
            "this process was forked after kernels had run in its parent, whose OpenMP threads did not come along: "
            "start it with multiprocessing's 'spawn' or 'forkserver', or set NUMBA_THREADING_LAYER=workqueue before the first run"
        )
    return int(numba.get_num_threads())


def _note_fork() -> None:
    try:
        layer = _threading_layer()
    except ValueError:  # no threads were started yet
        return
    if layer == "omp":
        pool = sys.modules["numba.np.ufunc.omppool"]  # loaded with the layer; there only where Numba was built with OpenMP
        _lost_in_fork[0] = _lost_in_fork[0] or pool.openmp_vendor == "GNU"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
