"""The steps of `wse-emu sparsify` as a picture: loss on the left axis, keys and values on the right one."""

from __future__ import annotations

import math

from wse_emu.doctor.sparsify import SparsifyReport

_WIDTH, _HEIGHT = 680.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 84.0, 36.0, 52.0
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LOSS, _BYTES, _MARKED = "#204080", "#c8d4e4", "#f0a030"


def plot(report: SparsifyReport) -> str:
    """The steps as one SVG picture: loss as a line, keys and values as columns, the proposal marked; both axes with their scales."""
    steps, n = report.steps, len(report.steps)
    low, high = min(step.loss for step in steps), max(step.loss for step in steps)
    if high == low:
        low, high = low - 0.5, high + 0.5
    most = max(step.kv_bytes for step in steps) or 1
    unit, name = next(((size, name) for size, name in _UNITS if most >= size), (1.0, "bytes"))
    width = (_WIDTH - _LEFT - _RIGHT) / n

    def x(i: float) -> float:
        return _LEFT + width * (i + 0.5)

    def y(fraction: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * fraction

    losses = _ticks(low, high)
    bottom, top = losses[0], losses[-1]
    columns = _ticks(0.0, most / unit)
    tallest = columns[-1] * unit
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" font-family="sans-serif" font-size="11">',
        _text(_LEFT, 16, f"{report.n_tokens:,} tokens of text; proposed: {len(report.proposed.sparse_layers)} sparse layers", "start"),
    ]
    for i, step in enumerate(steps):
        at = y(step.kv_bytes / tallest)
        out.append(
            f'<rect x="{x(i) - 0.35 * width:.1f}" y="{at:.1f}" width="{0.7 * width:.1f}" height="{y(0) - at:.1f}" '
            f'fill="{_MARKED if step is report.proposed else _BYTES}"><title>{len(step.sparse_layers)} sparse layers: '
            f"loss {step.loss:.5f}, {step.kv_bytes:,} bytes</title></rect>"
        )
    line = " ".join(f"{x(i):.1f},{y((step.loss - bottom) / (top - bottom)):.1f}" for i, step in enumerate(steps))
    out.append(f'<polyline points="{line}" fill="none" stroke="{_LOSS}" stroke-width="2"/>')
    left, right = _LEFT, _WIDTH - _RIGHT
    out.append(f'<path d="M{left} {y(1):.1f} V{y(0):.1f} H{right} V{y(1):.1f}" fill="none" stroke="black"/>')
    digits = max(0, -math.floor(math.log10(losses[1] - losses[0])))
    out += [_text(left - 6, y((loss - bottom) / (top - bottom)) + 4, f"{loss:.{digits}f}", "end") for loss in losses]
    out += [_text(right + 6, y(size * unit / tallest) + 4, f"{size:g}", "start") for size in columns]
    every = math.ceil(n / 20)
    out += [_text(x(i), y(0) + 16, str(len(step.sparse_layers)), "middle") for i, step in enumerate(steps) if i % every == 0]
    out += [
        _text(x((n - 1) / 2), _HEIGHT - 12, "sparse layers, the least sensitive first", "middle"),
        _sideways(16, y(0.5), "loss, nats a token (line)"),
        _sideways(_WIDTH - 10, y(0.5), f"keys and values, {name} (columns)"),
        "</svg>",
        "",
    ]
    return "\n".join(out)


def _ticks(low: float, high: float) -> list[float]:
    """Some four to eight round numbers, the first at most `low`, the last at least `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if rough <= power * m * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _sideways(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" transform="rotate(-90 {x:.1f} {y:.1f})">{text}</text>'
