"""Write a kernel of your own: one function, for one core, on that core's blocks.

The kernel below computes router gates, ``max(x @ w_gate, 0)``. Tokens lie over the rows of cores and experts over the columns, so every
core holds the tokens of its row and the experts of its column, and needs nothing from its neighbours.

    python examples/custom_kernel.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import wse_emu as wse
from wse_kernels.fma import fma

F32 = NDArray[np.float32]


@wse.kernel(
    out=("gates",),
    scratch=("scores",),
    code_bytes=900,
    macs=lambda shapes: shapes["x"][0] * shapes["x"][1] * shapes["w_gate"][1],
)
def gate(x: F32, w_gate: F32, gates: F32, scores: F32) -> None:
    """``gates = max(x @ w_gate, 0)``; x (m, k), w_gate (k, n), gates (m, n), scores at least (n,): all float32, on one core."""
    n = w_gate.shape[1]
    for i in range(x.shape[0]):
        for j in range(n):
            scores[j] = np.float32(0.0)
        for k in range(x.shape[1]):  # the sum runs over k in order; the inner loop runs over outputs, so it vectorises
            a = x[i, k]
            for j in range(n):
                scores[j] = fma(a, w_gate[k, j], scores[j])
        for j in range(n):
            gates[i, j] = max(scores[j], np.float32(0.0))


def compute(x: F32, w_gate: F32, *, rows: int, cols: int, executor: str) -> tuple[F32, int]:
    """Gates (tokens, experts) float32 from a wafer of `rows` x `cols` cores, and the multiply-adds its ledger counted."""
    wafer = wse.Wafer(wse.TINY, rows=rows, cols=cols, executor=executor)
    with (
        wafer.place(x, axes=("row", None), name="x") as tokens,
        wafer.place(w_gate, axes=(None, "col"), name="w_gate") as weights,
        wafer.place(np.zeros((len(x), w_gate.shape[1]), np.float32), name="gates") as gates,
    ):
        n_experts_per_core = -(-w_gate.shape[1] // cols)
        wafer.launch(gate, x=tokens, w_gate=weights, gates=gates, scores=wse.scratch(n_experts_per_core))
        (total,) = wafer.ledger.totals(by=())
        return gates.gather(), total["macs"]


def main(n_tokens: int = 10, hidden: int = 32, n_experts: int = 6) -> None:
    """Run the kernel in three ways, show that they agree bit for bit, and hold the result against float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_tokens, hidden)).astype(np.float32)
    w_gate = rng.normal(size=(hidden, n_experts)).astype(np.float32)
    exact = np.maximum(x.astype(np.float64) @ w_gate, 0)
    results = {}
    for executor in ("batched", "isolated", "interpreted"):
        results[executor], macs = compute(x, w_gate, rows=3, cols=4, executor=executor)
        error = float(np.abs(results[executor] - exact).max())
        print(f"{executor:12} {macs} multiply-adds, largest error against float64 {error:.1e}")
    same = all(np.array_equal(results["batched"], other) for other in results.values())
    print(f"the three agree bit for bit: {same}")


if __name__ == "__main__":
    main()
