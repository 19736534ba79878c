"""Kernels that run for some of the tokens: those in the first places of a core's block, where a product has put them, or in their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from wse_emu.layers.linear import Selection
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer


def run_selected(
    wafer: Wafer, kernel: Kernel, tensors: dict[str, PlacedTensor], others: dict[str, Any], selection: Selection | None
) -> None:
    """Run a body on every core that holds features, and tokens; of `tensors` just the first places with a selection."""
    if selection is None:
        wafer.launch(kernel, **tensors, **others)
        return
    split = next(iter(tensors.values())).placement.axis1[1]
    rows, m = np.flatnonzero(selection.counts), selection.n_tokens
    with wafer.sram.code(kernel.name, kernel.code_bytes):
        if wafer.cores is not None:
            for row in rows.tolist():
                for col in split.used.tolist():
                    places = slice(0, int(selection.counts[row]))
                    blocks = {name: tensor.held[row, col].view(places) for name, tensor in tensors.items()}
                    extra = {n: v.held[row, col] if isinstance(v, PlacedTensor) else v for n, v in others.items()}
                    wafer.cores.run(kernel, (row, col), {**blocks, **extra})
        elif not wafer.is_dry and m:
            for col in split.used.tolist():
                blocks = {name: panel(tensor, col, m) for name, tensor in tensors.items()}
                extra = {n: panel(v, col, 1) if isinstance(v, PlacedTensor) else v for n, v in others.items()}
                kernel.body(*({**blocks, **extra}[name] for name in kernel.params))
            for name in (*kernel.out, *kernel.inout):
                tensors[name].settle()
    wafer.record(Event(None, "", "launch", kernel.name, count=int(rows.size * split.used.size)))


def run_only(
    wafer: Wafer, kernel: Kernel, tensors: dict[str, PlacedTensor], others: dict[str, PlacedTensor], tokens: Selection, bands: TokenBands
) -> None:
    """Run a body with parameter ``rows`` on every core that holds features and some of the tokens: their places, known by the program.

    `tensors` are read and written at those places; of `others` each core has a row.
    """
    split = next(iter(tensors.values())).placement.axis1[1]
    rows = np.flatnonzero(tokens.counts)
    runs = int(rows.size * split.used.size)
    with wafer.sram.code(kernel.name, kernel.code_bytes):
        if wafer.cores is not None:
            runs = 0
            for row in rows.tolist():
                places = tokens.local_rows(bands, row)
                for col in split.used.tolist():
                    blocks = {name: tensor.held[row, col] for name, tensor in {**tensors, **others}.items()}
                    wafer.cores.run(kernel, (row, col), {**blocks, "rows": places})
                    runs += 1
        elif not wafer.is_dry:
            for col in split.used.tolist():
                panels = {name: panel(tensor, col, bands.n_tokens) for name, tensor in tensors.items()}
                panels |= {name: panel(tensor, col, 1) for name, tensor in others.items()}
                kernel.body(*({**panels, "rows": tokens.rows}[name] for name in kernel.params))
            for name in kernel.inout:
                tensors[name].settle()
    wafer.record(Event(None, "", "launch", kernel.name, count=runs))


def panel(tensor: PlacedTensor, col: int, n_rows: int) -> Any:
    """A column's panel of a tensor that holds `n_rows` rows."""
    split = tensor.placement.axis1[1]
    j0, j1 = int(split.starts[col]), int(split.stops[col])
    return tensor.flat[n_rows * j0 : n_rows * j1].reshape(n_rows, j1 - j0)
