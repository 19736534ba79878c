"""The isolated cores' part of a matrix product: slabs down the columns, partial products, and their chain along each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Cores, Slices
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD
from wse_emu.wafer.tensor import PlacedTensor
from wse_kernels.matmul import partial_matmul

PARTIAL_MATMUL = Kernel(
    body=partial_matmul,
    params=("x", "rows", "w", "p"),
    out=("p",),
    code_bytes=640,
    macs=lambda s: s["rows"][0] * s["w"][0] * s["w"][1],
)


class RowProducts:
    """Products of one tensor with pieces of one matrix, core by core; counts what it does.

    Parameters
    ----------
    cores : Cores
    weight : StreamedMatrix
        What its pieces are of.
    x : PlacedTensor
        Its columns, split over columns of cores, are the rows of the matrix.
    slab, part, inbox : PlacedTensor
        Work blocks: slabs of the piece in flight, partial sums, and incoming sums in the format in which they are handed on.
    """

    def __init__(
        self, cores: Cores, weight: StreamedMatrix, x: PlacedTensor, slab: PlacedTensor, part: PlacedTensor, inbox: PlacedTensor
    ) -> None:
        self.handed = cores.traffic()
        """Finished blocks on their way to their owners."""
        self._cores, self._weight, self._name, self._x = cores, weight, weight.name, x
        self._slab, self._part, self._inbox = slab, part, inbox
        self._split = x.placement.axis1[1]
        self._stream, self._chain = cores.traffic(), cores.traffic()
        self._slabs: dict[tuple[int, int], Block] = {}
        self._runs = self._added = self._macs = 0

    def stream(self, columns: NDArray[np.float32], rows: Sequence[int]) -> None:
        """Broadcast each column's slab of a piece (n_in, n) down to `rows`."""
        self._slabs = {}
        for col in self._split.used.tolist():
            k0, k1 = int(self._split.starts[col]), int(self._split.stops[col])
            for row in rows:
                self._slabs[row, col] = self._slab.held[row, col].prefix(k1 - k0, columns.shape[1])
            slabs = [self._slabs[row, col] for row in rows]
            self._cores.from_edge(self._stream, columns[k0:k1], col, slabs, skip_zeros=self._weight.leaves_zeros)

    def product(self, row: int, m: int, local_rows: Callable[[int], Any], *, compact: bool) -> Block:
        """One row's product with the piece streamed last, chained west to east; the (m, n) result lies on the last column.

        `local_rows` gives, for a column of cores, which rows of its block of x are meant; with `compact` only the first m may be read.
        """
        acc: Block | None = None
        for col in self._split.used.tolist():
            core = (row, col)
            w = self._slabs[core]
            p = self._part.held[core].prefix(m, w.array.shape[1])
            x = self._x.held[core]
            args = {"x": x.view(slice(0, m)) if compact else x, "rows": local_rows(col), "w": w, "p": p}
            self._macs += self._cores.run(PARTIAL_MATMUL, core, args)
            self._runs += 1
            if acc is None:
                acc = p
                continue
            come = self._inbox.held[core].prefix(m, w.array.shape[1])
            self._cores.send(self._chain, acc, [come])
            self._cores.run(CHAIN_ADD, core, {"acc": p, "p": come})
            self._added += 1
            acc = p
        assert acc is not None
        return acc

    def hand(self, acc: Block, target: Block, to: Slices, where: Slices = slice(None)) -> None:
        """Send elements of a finished block to their owner; a core that owns them itself only stores them."""
        if acc.core == target.core:
            target.write(acc.read(where), to)
        else:
            self._cores.send(self.handed, acc, [target], where=where, to=to)

    def events(self) -> list[Event]:
        """What was streamed, computed, chained and handed over."""
        stream = self._stream.event("stream", self._name, costs.COLORS["stream"])
        return [
            stream._replace(bytes=self._weight.bytes_of(stream.wavelets)),
            Event(None, "", "launch", PARTIAL_MATMUL.name, count=self._runs, macs=self._macs),
            self._chain.event("chain", self._name, costs.COLORS["chain"]),
            Event(None, "", "launch", CHAIN_ADD.name, count=self._added),
            self.handed.event("deliver", self._name, costs.COLORS["deliver"]),
        ]
