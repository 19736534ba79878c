"""Move data between cores: a matrix-vector product whose partial sums meet over the fabric.

Core (r, c) holds a block of the matrix and a piece of the vector. It multiplies the two; the partial results of a row of cores are added
from west to east, the sum is delivered to its owner, and a gather brings the result to one core.

    python examples/moves.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import wse_emu as wse
from wse_kernels.fma import fma

F32 = NDArray[np.float32]


@wse.kernel(out=("p",), code_bytes=400, macs=lambda shapes: shapes["a"][0] * shapes["a"][1])
def multiply(a: F32, x: F32, p: F32) -> None:
    """``p[i] = sum of a[i, k] * x[k]``; a (m, k), x (1, k), p (m, 1), float32, on one core."""
    for i in range(a.shape[0]):
        acc = np.float32(0.0)
        for k in range(a.shape[1]):
            acc = fma(a[i, k], x[0, k], acc)
        p[i, 0] = acc


def product(a: F32, x: F32, *, rows: int, cols: int, executor: str) -> tuple[F32, wse.Wafer]:
    """``a @ x`` of an (m, k) matrix and a (k,) vector, float32, and the wafer that computed it."""
    wafer = wse.Wafer(wse.TINY, rows=rows, cols=cols, executor=executor)
    m = a.shape[0]
    of_rows = ("row", wse.Split.balanced(m, rows))
    with (
        wafer.place(a, name="a") as matrix,
        wafer.place(x.reshape(1, -1), axes=(None, "col"), name="x") as vector,
        wafer.empty("partial sums", wafer.placement((m, cols), of_rows, ("col", wse.Split.uniform(1, cols)))) as partials,
        wafer.empty("y", wafer.placement((m, 1), of_rows, ("col", wse.Split.single(1, 0, cols)))) as y,
        wafer.empty(
            "result", wafer.placement((m, 1), ("row", wse.Split.single(m, 0, rows)), ("col", wse.Split.single(1, 0, cols)))
        ) as result,
    ):
        wafer.launch(multiply, a=matrix, x=vector, p=partials)
        wse.moves.chain_row(wafer, partials, y)
        wse.moves.gather_to_core(wafer, y, result)
        return result.block(0, 0)[:, 0].copy(), wafer


def main(m: int = 24, k: int = 40, rows: int = 3, cols: int = 4) -> None:
    """Run it in three ways, show that they agree bit for bit, and say what moved."""
    rng = np.random.default_rng(0)
    a, x = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=k).astype(np.float32)
    results = {name: product(a, x, rows=rows, cols=cols, executor=name) for name in ("batched", "isolated", "interpreted")}
    y, wafer = results["batched"]
    print(f"largest error against float64 {np.abs(y - a.astype(np.float64) @ x).max():.1e}")
    print(f"the three agree bit for bit: {all(np.array_equal(y, other) for other, _ in results.values())}")
    for row in wafer.ledger.totals(by=("kind",)):
        print(f"{row['kind']:8} {row['count']:4} times {row['bytes']:6,} bytes, at most {row['max_hops']} hops")


if __name__ == "__main__":
    main()
