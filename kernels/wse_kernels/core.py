"""Where a kernel runs: the first argument of a body that asks for it."""

from __future__ import annotations

from typing import NamedTuple


class Core(NamedTuple):
    """Position of a core and size of its grid."""

    row: int
    col: int
    n_rows: int
    n_cols: int
