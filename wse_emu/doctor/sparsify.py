"""Which layers of a model may attend sparsely: every layer's sensitivity, and what a growing set of sparse layers costs and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from wse_emu.foundation.errors import InputError

Measure = Callable[[tuple[int, ...]], tuple[float, int]]
"""Sparse layers, ascending, to the loss of the text and the bytes of keys and values at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyStep:
    """A model with some layers sparse."""

    sparse_layers: tuple[int, ...]
    """Ascending; the others are as the model has them."""
    added: int | None
    """The layer that the step before did not have."""
    loss: float
    """Mean cross entropy of the text's tokens after the first, in nats."""
    kv_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyReport:
    """Which layers to keep dense, and why."""

    loss: float
    """Of the model as it is."""
    kv_bytes: int
    sensitivity: tuple[float, ...]
    """Per layer: by how much the loss rises when that layer alone is sparse."""
    steps: tuple[SparsifyStep, ...]
    """From no sparse layer to all, the least sensitive first."""
    dense_layers: tuple[int, ...]
    """The proposal: the most sensitive ones, ascending."""

    @property
    def proposed(self) -> SparsifyStep:
        """The step at which those are dense."""
        return self.steps[len(self.sensitivity) - len(self.dense_layers)]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["sparse layers  added  loss rises alone      loss    keys and values, bytes"]
        for step in self.steps:
            alone = "" if step.added is None else f"{self.sensitivity[step.added]:+.6f}"
            mark = "  <- proposed" if step is self.proposed else ""
            added = "" if step.added is None else step.added
            lines.append(f"{len(step.sparse_layers):>13}  {added:>5}  {alone:>17}  {step.loss:>8.5f}  {step.kv_bytes:>24,}{mark}")
        return "\n".join([*lines, f"keep dense: {', '.join(map(str, self.dense_layers)) or 'none'}"])


def sparsify(n_layers: int, keep_dense: int, measure: Measure) -> SparsifyReport:
    """Measure each layer alone, then let the least sensitive ones become sparse one after the other.

    Parameters
    ----------
    n_layers : int
    keep_dense : int
        Layers that stay dense in the proposal. Of layers that are equally sensitive the earlier ones become sparse first.
    measure : callable

    Raises
    ------
    InputError
        If `keep_dense` does not lie in ``0..n_layers``.
    """
    if type(keep_dense) is not int or not 0 <= keep_dense <= n_layers:
        raise InputError(f"`keep_dense` must be an integer in 0..{n_layers} (layers of the model), got {keep_dense!r}")
    loss, kv_bytes = measure(())
    alone = [measure((layer,)) for layer in range(n_layers)]
    sensitivity = tuple(one[0] - loss for one in alone)
    order = sorted(range(n_layers), key=lambda layer: (sensitivity[layer], layer))
    steps = [SparsifyStep(sparse_layers=(), added=None, loss=loss, kv_bytes=kv_bytes)]
    for n in range(1, n_layers + 1):
        sparse = tuple(sorted(order[:n]))
        found = alone[sparse[0]] if n == 1 else measure(sparse)
        steps.append(SparsifyStep(sparse_layers=sparse, added=order[n - 1], loss=found[0], kv_bytes=found[1]))
    dense = tuple(sorted(order[n_layers - keep_dense :]))
    return SparsifyReport(loss=loss, kv_bytes=kv_bytes, sensitivity=sensitivity, steps=tuple(steps), dense_layers=dense)


def next_token_loss(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> float:
    """Mean cross entropy of every token but the first, in nats: logits (T, vocab) and ids (T,).

    Raises
    ------
    InputError
        If there is no second token.
    """
    if len(ids) < 2:
        raise InputError(f"a loss needs two tokens of text, got {len(ids)}")
    wide = logits[:-1].astype(np.float64)
    return float((logsumexp(wide, axis=1) - np.take_along_axis(wide, ids[1:, None], axis=1)[:, 0]).mean())


def plot(report: SparsifyReport) -> str:
    """The steps as one SVG picture: loss as a line, keys and values as columns, the proposal marked."""
    losses = [step.loss for step in report.steps]
    low, high = min(losses), max(losses)
    width, height, n = 640.0, 240.0, len(report.steps)

    def x(i: int) -> float:
        return 40 + (width - 80) * (i + 0.5) / n

    def y(loss: float) -> float:
        return height - 40 - (height - 80) * ((loss - low) / (high - low) if high > low else 0.0)

    most = max(step.kv_bytes for step in report.steps) or 1
    bars = [
        f'<rect x="{x(i) - 0.3 * (width - 80) / n:.1f}" y="{height - 40 - (height - 80) * step.kv_bytes / most:.1f}" '
        f'width="{0.6 * (width - 80) / n:.1f}" height="{(height - 80) * step.kv_bytes / most:.1f}" '
        f'fill="{"#f0a030" if step is report.proposed else "#c8d4e4"}"><title>{len(step.sparse_layers)} sparse layers: '
        f"loss {step.loss:.5f}, {step.kv_bytes:,} bytes</title></rect>"
        for i, step in enumerate(report.steps)
    ]
    line = " ".join(f"{x(i):.1f},{y(loss):.1f}" for i, loss in enumerate(losses))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="11">',
        *bars,
        f'<polyline points="{line}" fill="none" stroke="#204080" stroke-width="2"/>',
        f'<text x="40" y="16">loss {low:.4f} to {high:.4f} (line), keys and values up to {most:,} bytes (columns)</text>',
        f'<text x="40" y="{height - 14:.0f}">sparse layers, 0 to {n - 1}; proposed: {len(report.proposed.sparse_layers)}</text>',
        "</svg>",
        "",
    ])  # fmt: skip
