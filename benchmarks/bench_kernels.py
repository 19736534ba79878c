"""Every kernel of one core beside NumPy and torch, on blocks that fit a core's SRAM: one thread, data in its cache.

    pytest benchmarks/bench_kernels.py --benchmark-only

NumPy's side is what one would write without a compiler. On blocks of this size a call of either library costs about a microsecond, which
is part of what is compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks.cases import F32, Cases, composed, normal, relative, torch_call, torch_side
from benchmarks.racing import Call, Case, Race, Work
from wse_emu.equivalence.gradient_bounds import glu_gradient_bound, logits_gradient_bound
from wse_emu.equivalence.tolerance import U, capped_bound, clamped_glu_bound, linear_bound, sum_bound
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule
from wse_emu.layers.router import router_code
from wse_emu.reference.ffn_gradients import glu_slopes
from wse_emu.reference.formulas import clamped_glu
from wse_emu.reference.routing_gradients import logits_gradient
from wse_kernels import (
    attention,
    attention_rounded,
    elementwise,
    exp,
    ffn,
    ffn_backward,
    formats,
    head_norm,
    head_slots,
    index_keys,
    layer_norm,
    log,
    matmul,
    norm,
    qk_norm,
    query_temperature,
    rope,
    routing,
    routing_backward,
    storage,
)
from wse_kernels import routing_together as together
from wse_kernels.sparse_attention import attend_listed

CASES = Cases()
EPS = np.float32(1e-5)


@pytest.mark.parametrize("name", CASES.keys())
def test_kernel(name: str, race: Race, smoke: bool) -> None:
    race.case(CASES[name](smoke))


def _block(smoke: bool) -> tuple[int, int]:
    """Tokens and features of a block: 16 KiB as float32."""
    return (4, 8) if smoke else (64, 64)


# ---- element by element


def _elementwise(name: str, call: Any, numpy: Any, torch: Any, exact: Any, roundings: float) -> None:
    def make(smoke: bool) -> Case:
        x = 4 * normal(*_block(smoke)).ravel()
        out = np.empty_like(x)

        def ours() -> F32:
            call(x, out)
            return out

        peers = {"numpy": lambda: numpy(x), **torch_call(lambda t, v: torch(t, v), x)}
        right = exact(x.astype(np.float64))
        return Case(ours, peers, (right,), (relative(right, roundings),), Work(bytes=2 * x.nbytes), parallel=False)

    CASES.add(name)(make)


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


_elementwise("exp_array", exp.exp_array, np.exp, lambda t, v: t.exp(v), np.exp, 4)
_elementwise("sigmoid_array", exp.sigmoid_array, _logistic, lambda t, v: t.sigmoid(v), _logistic, 8)
_elementwise("silu_array", exp.silu_array, _silu, lambda t, v: t.nn.functional.silu(v), _silu, 10)
_elementwise(
    "softplus_array", log.softplus_array, lambda x: np.logaddexp(np.float32(0), x), lambda t, v: t.nn.functional.softplus(v),
    lambda x: np.logaddexp(0, x), 8,
)  # fmt: skip


def _gelu_tanh(x: Any) -> Any:
    return x / 2 * (1 + np.tanh(x.dtype.type((2 / np.pi) ** 0.5) * (x + x.dtype.type(0.044715) * x**3)))


@CASES.add("tanh_array")
def _tanh_array(smoke: bool) -> Case:
    x = 4 * normal(*_block(smoke)).ravel()
    out = np.empty_like(x)

    def ours() -> F32:
        exp.tanh_array(x, out)
        return out

    right = np.tanh(x.astype(np.float64))
    peers = {"numpy": lambda: np.tanh(x), **torch_call(lambda t, v: t.tanh(v), x)}
    return Case(ours, peers, (right,), (relative(right, 8),), Work(bytes=2 * x.nbytes), parallel=False)


@CASES.add("gelu_tanh_array")
def _gelu_tanh_array(smoke: bool) -> Case:
    x = 2 * normal(*_block(smoke)).ravel()
    out = np.empty_like(x)

    def ours() -> F32:
        exp.gelu_tanh_array(x, out)
        return out

    right = _gelu_tanh(x.astype(np.float64))
    peers = {"numpy": lambda: _gelu_tanh(x), **torch_call(lambda t, v: t.nn.functional.gelu(v, approximate="tanh"), x)}
    # Libraries take 1 + tanh, which loses where tanh is near -1: an error relative to the argument, not to the result.
    bound = relative(right, 40) + 4 * U * np.abs(x)
    return Case(ours, peers, (right,), (bound,), Work(bytes=2 * x.nbytes), parallel=False)


def _in_place(name: str, call: Any, formula: Any, torch: Any, roundings: float, *shapes: Any) -> None:
    """A kernel that changes a block: each call begins with the same values, as the peers' do. `shapes`: of more blocks, of (t, n)."""

    def make(smoke: bool) -> Case:
        before, out = 2 * normal(*_block(smoke)), np.empty(_block(smoke), np.float32)
        more = [normal(*shape(*before.shape), seed=i) for i, shape in enumerate(shapes, 1)]

        def ours() -> F32:
            out[...] = before
            call(out, *more)
            return out

        right = formula(before.astype(np.float64), *(m.astype(np.float64) for m in more))
        peers = {"numpy": lambda: formula(before, *more), **torch_call(torch, before, *more)}
        # A sum may cancel: its rounding errors are relative to what is added.
        size = np.abs(right) + sum(np.abs(m.astype(np.float64)) for m in more)
        return Case(ours, peers, (right,), (relative(size, roundings),), Work(bytes=2 * before.nbytes), parallel=False)

    CASES.add(name)(make)


_LIMIT = np.float32(1.5)
_in_place("add_bias", elementwise.add_bias, lambda x, b: x + b, lambda t, x, b: x + b, 1, lambda t, n: (1, n))
_in_place(
    "add_bias_to", lambda x, b: elementwise.add_bias_to(x, np.arange(0, len(x), 2), b),
    lambda x, b: x + b * (np.arange(len(x)) % 2 == 0)[:, None], lambda t, x, b: x + b * (t.arange(len(x)) % 2 == 0)[:, None], 1,
    lambda t, n: (1, n),
)  # fmt: skip
_in_place(
    "add_scaled", lambda x, y: elementwise.add_scaled(x, y, _LIMIT), lambda x, y: x + y * x.dtype.type(_LIMIT),
    lambda t, x, y: x + y * float(_LIMIT), 4, lambda t, n: (t, n),
)  # fmt: skip
_in_place(
    "clip_to", lambda x: elementwise.clip_to(x, _LIMIT), lambda x: np.clip(x, -_LIMIT, _LIMIT),
    lambda t, x: x.clamp(-float(_LIMIT), float(_LIMIT)), 0,
)  # fmt: skip
_in_place(
    "soft_cap", lambda x: elementwise.soft_cap(x, _LIMIT), lambda x: x.dtype.type(_LIMIT) * np.tanh(x / x.dtype.type(_LIMIT)),
    lambda t, x: float(_LIMIT) * t.tanh(x / float(_LIMIT)), 12,
)  # fmt: skip
_in_place(
    "scale_by_sigmoid", elementwise.scale_by_sigmoid, lambda x, g: x / (1 + np.exp(-g)), lambda t, x, g: x * t.sigmoid(g), 10,
    lambda t, n: (t, 1),
)  # fmt: skip


@CASES.add("log_array")
def _log_array(smoke: bool) -> Case:
    x = np.abs(normal(*_block(smoke)).ravel()) + np.float32(2.0)  # away from 1, where the relative error of the peers has no bound
    out = np.empty_like(x)

    def ours() -> F32:
        log.log_array(x, out)
        return out

    peers = {"numpy": lambda: np.log(x), **torch_call(lambda t, v: t.log(v), x)}
    right = np.log(x.astype(np.float64))
    return Case(ours, peers, (right,), (relative(right, 4),), Work(bytes=2 * x.nbytes), parallel=False)


def _decode(name: str, call: Any, fmt: formats.FloatFormat, numpy: Any, torch_dtype: str | None) -> None:
    def make(smoke: bool) -> Case:
        codes = formats.encode(normal(*_block(smoke)).ravel(), fmt)
        out = np.empty(codes.size, np.float32)

        def ours() -> F32:
            call(codes, out)
            return out

        peers: dict[str, Call] = {"numpy": lambda: numpy(codes)}
        if torch_dtype is not None:
            peers |= torch_call(lambda t, v: v.view(getattr(t, torch_dtype)).float(), codes.view(np.int16))
        return Case(ours, peers, (formats.decode(codes, fmt),), (0,), Work(bytes=codes.nbytes + out.nbytes), parallel=False)

    CASES.add(name)(make)


def _encode(name: str, call: Any, fmt: formats.FloatFormat, numpy: Any, torch_dtype: str | None) -> None:
    def make(smoke: bool) -> Case:
        x = normal(*_block(smoke)).ravel()
        out = np.empty(x.size, np.uint16)

        def ours() -> Any:
            call(x, out)
            return out

        peers: dict[str, Call] = {"numpy": lambda: numpy(x)}
        if torch_dtype is not None:
            # torch knows these codes as signed integers only; a view changes no bit.
            peers |= torch_call(lambda t, v: v.to(getattr(t, torch_dtype)).view(t.int16).numpy().view(np.uint16), x)
        return Case(ours, peers, (formats.encode(x, fmt),), (0,), Work(bytes=x.nbytes + out.nbytes), parallel=False)

    CASES.add(name)(make)


_BF16 = ml_dtypes.bfloat16
_decode("decode_bf16", formats.decode_bf16, formats.BF16, lambda c: c.view(_BF16).astype(np.float32), "bfloat16")
_encode("encode_bf16", formats.encode_bf16, formats.BF16, lambda x: x.astype(_BF16).view(np.uint16), "bfloat16")
_decode("decode_f16", formats.decode_f16, formats.F16, lambda c: c.view(np.float16).astype(np.float32), "float16")
_encode("encode_f16", formats.encode_f16, formats.F16, lambda x: x.astype(np.float16).view(np.uint16), "float16")
_decode("decode_cb16", formats.decode_cb16, formats.CB16, lambda c: formats.decode(c, formats.CB16), None)
_encode("encode_cb16", formats.encode_cb16, formats.CB16, lambda x: formats.encode(x, formats.CB16), None)


def _round(name: str, call: Any, numpy: Any, torch_dtype: str | None) -> None:
    def make(smoke: bool) -> Case:
        before = normal(*_block(smoke)).ravel()
        out, right = before.copy(), numpy(before)

        def ours() -> F32:
            out[...] = before
            call(out)
            return out

        peers: dict[str, Call] = {"numpy": lambda: numpy(before)}
        if torch_dtype is not None:
            peers |= torch_call(lambda t, v: v.to(getattr(t, torch_dtype)).float(), before)
        return Case(ours, peers, (right,), (0,), Work(bytes=2 * before.nbytes), parallel=False)

    CASES.add(name)(make)


_round("round_bf16", storage.round_bf16, lambda x: x.astype(_BF16).astype(np.float32), "bfloat16")
_round("round_f16", storage.round_f16, lambda x: x.astype(np.float16).astype(np.float32), "float16")
_round("round_cb16", storage.round_cb16, lambda x: formats.decode(formats.encode(x, formats.CB16), formats.CB16), None)


@CASES.add("copy_to")
def _copy_to(smoke: bool) -> Case:
    x = normal(*_block(smoke))
    out = np.empty_like(x)

    def ours() -> F32:
        storage.copy_to(x, out)
        return out

    peers = {"numpy": x.copy, **torch_call(lambda t, v: v.clone(), x)}
    return Case(ours, peers, (x,), (0,), Work(bytes=2 * x.nbytes), parallel=False)


# ---- sums of blocks; those that work in place start from one block again and again only where it matters to the time


@CASES.add("add_to")
def _add_to(smoke: bool) -> Case:
    x, y = normal(*_block(smoke)), normal(*_block(smoke), seed=1)
    out = x.copy()
    right = x.astype(np.float64) + y

    def ours() -> F32:
        norm.add_to(out, y)
        return out

    peers = {"numpy": lambda: x + y, **torch_call(lambda t, a, b: a + b, x, y)}
    return Case(ours, peers, (right,), (relative(right, 1),), Work(bytes=3 * x.nbytes), parallel=False)


@CASES.add("chain_add")
def _chain_add(smoke: bool) -> Case:
    x, y = normal(*_block(smoke)), normal(*_block(smoke), seed=1)
    out = x.copy()
    right = x.astype(np.float64) + y

    def ours() -> F32:
        matmul.chain_add(out, y)
        return out

    peers = {"numpy": lambda: x + y, **torch_call(lambda t, a, b: a + b, x, y)}
    return Case(ours, peers, (right,), (relative(right, 1),), Work(bytes=3 * x.nbytes), parallel=False)


@CASES.add("chain_max")
def _chain_max(smoke: bool) -> Case:
    x, y = normal(*_block(smoke)), normal(*_block(smoke), seed=1)
    out = x.copy()

    def ours() -> F32:
        norm.chain_max(out, y)
        return out

    peers = {"numpy": lambda: np.maximum(x, y), **torch_call(lambda t, a, b: t.maximum(a, b), x, y)}
    return Case(ours, peers, (np.where(x > y, x, y),), (0,), Work(bytes=3 * x.nbytes), parallel=False)


@CASES.add("chain_panels")
def _chain_panels(smoke: bool) -> Case:
    n_cols, size = _block(smoke)
    partials, cols, out = normal(n_cols, size), np.arange(n_cols), np.empty(size, np.float32)

    def ours() -> F32:
        norm.chain_panels(partials.reshape(-1), size, cols, out)
        return out

    peers = {"numpy": lambda: partials.sum(axis=0), **torch_call(lambda t, p: p.sum(0), partials)}
    right = partials.astype(np.float64).sum(axis=0)
    bound = linear_bound(np.ones((1, n_cols)), partials.T)[0]
    return Case(ours, peers, (right,), (bound,), Work(bytes=partials.nbytes + out.nbytes), parallel=False)


@CASES.add("fill_zero")
def _fill_zero(smoke: bool) -> Case:
    x = normal(*_block(smoke))

    def ours() -> F32:
        norm.fill_zero(x)
        return x

    def numpy() -> F32:
        x[...] = 0
        return x

    peers = {"numpy": numpy, **torch_call(lambda t, v: v.zero_(), x)}
    return Case(ours, peers, (np.zeros(x.shape),), (0,), Work(bytes=x.nbytes), parallel=False)


@CASES.add("swiglu_into")
def _swiglu_into(smoke: bool) -> Case:
    t, n = _block(smoke)
    y = normal(t, n)
    h = np.empty((t, n // 2), np.float32)
    gate, up = y[:, ::2].astype(np.float64), y[:, 1::2].astype(np.float64)
    right = gate / (1 + np.exp(-gate)) * up

    def ours() -> F32:
        ffn.swiglu_into(y, 0, h)
        return h

    def numpy() -> F32:
        g = y[:, ::2]
        return g / (1 + np.exp(-g)) * y[:, 1::2]

    peers = {"numpy": numpy, **torch_call(lambda t, v: t.nn.functional.silu(v[:, ::2]) * v[:, 1::2], y)}
    return Case(ours, peers, (right,), (relative(right, 10),), Work(bytes=y.nbytes + h.nbytes), parallel=False)


@CASES.add("geglu_into")
def _geglu_into(smoke: bool) -> Case:
    t, n = _block(smoke)
    y = normal(t, n)
    h = np.empty((t, n // 2), np.float32)
    gate, up = y[:, ::2].astype(np.float64), y[:, 1::2].astype(np.float64)
    right = _gelu_tanh(gate) * up

    def ours() -> F32:
        ffn.geglu_into(y, 0, h)
        return h

    peers = {
        "numpy": lambda: _gelu_tanh(y[:, ::2]) * y[:, 1::2],
        **torch_call(lambda t, v: t.nn.functional.gelu(v[:, ::2], approximate="tanh") * v[:, 1::2], y),
    }
    bound = relative(right, 42) + 4 * U * np.abs(gate * up)
    return Case(ours, peers, (right,), (bound,), Work(bytes=y.nbytes + h.nbytes), parallel=False)


@CASES.add("clamped_glu")
def _clamped_glu(smoke: bool) -> Case:
    t, n = _block(smoke)
    y, alpha, limit = normal(t, n), np.float32(1.702), np.float32(1.5)
    h = np.empty((t, n // 2), np.float32)

    def ours() -> F32:
        ffn.clamped_glu(y, alpha, limit, h)
        return h

    def numpy() -> F32:
        g, u = np.minimum(y[:, ::2], limit), np.clip(y[:, 1::2], -limit, limit)
        return (u + 1) * (g / (1 + np.exp(-alpha * g)))

    def torch(lib: Any, of: Any) -> Call:
        v, a, x = of(y), float(alpha), float(limit)
        return lambda: (v[:, 1::2].clamp(-x, x) + 1) * v[:, ::2].clamp(max=x) * (a * v[:, ::2].clamp(max=x)).sigmoid()

    g, u = y[:, ::2].astype(np.float64), y[:, 1::2].astype(np.float64)
    right, none = clamped_glu(g, u, float(alpha), float(limit)), np.zeros_like(g)
    bound = 2 * clamped_glu_bound(g, u, none, none, float(alpha), float(limit))  # twice: the peers round as they like
    return Case(ours, {"numpy": numpy, **torch_side(torch)}, (right,), (bound,), Work(bytes=y.nbytes + h.nbytes), parallel=False)


@CASES.add("combine_into")
def _combine_into(smoke: bool) -> Case:
    t, n = _block(smoke)
    y, before = normal(t // 2, n), normal(t, n, seed=1)
    rows, scale = np.arange(0, t, 2), normal(t // 2, seed=2)
    out = before.copy()
    right = before.astype(np.float64)
    right[rows] += scale[:, None].astype(np.float64) * y
    bound = 2 * U * (np.abs(right) + np.abs(before))

    def ours() -> F32:
        ffn.combine_into(y, rows, scale, 0, out)
        return out

    def numpy() -> F32:
        result = before.copy()
        result[rows] += scale[:, None] * y
        return result

    def torch(t: Any, of: Any) -> Call:
        a, b, r, s = of(y), of(before), of(rows), of(scale)
        return lambda: b.index_add(0, r, s[:, None] * a)

    peers = {"numpy": numpy, **torch_side(torch)}
    return Case(ours, peers, (right,), (bound,), Work(macs=y.size, bytes=3 * y.nbytes), parallel=False)


@CASES.add("combine_rows")
def _combine_rows(smoke: bool) -> Case:
    t, n = _block(smoke)
    y, before = normal(t, n), normal(t, n, seed=1)
    rows, scale = np.arange(0, t, 2), normal(t // 2, seed=2)
    out = before.copy()
    right = before.astype(np.float64)
    right[rows] += scale[:, None].astype(np.float64) * y[rows]
    bound = 2 * U * (np.abs(right) + np.abs(before))

    def ours() -> F32:
        ffn.combine_rows(y, rows, scale, out)
        return out

    def numpy() -> F32:
        result = before.copy()
        result[rows] += scale[:, None] * y[rows]
        return result

    def torch(t: Any, of: Any) -> Call:
        a, b, r, s = of(y), of(before), of(rows), of(scale)
        return lambda: b.index_add(0, r, s[:, None] * a[r])

    return Case(ours, {"numpy": numpy, **torch_side(torch)}, (right,), (bound,), Work(macs=y.size // 2, bytes=2 * y.nbytes), parallel=False)


@CASES.add("scale_rows")
def _scale_rows(smoke: bool) -> Case:
    t, n = _block(smoke)
    x, rows, scale = normal(t, n), np.arange(0, t, 2), normal(t // 2, seed=2)
    out = np.empty((t // 2, n), np.float32)
    right = x[rows] * scale[:, None]

    def ours() -> F32:
        ffn.scale_rows(x, rows, scale, out)
        return out

    def torch(t: Any, of: Any) -> Call:
        a, r, s = of(x), of(rows), of(scale)
        return lambda: a[r] * s[:, None]

    peers = {"numpy": lambda: x[rows] * scale[:, None], **torch_side(torch)}
    return Case(ours, peers, (right,), (0,), Work(bytes=2 * out.nbytes), parallel=False)


@CASES.add("partial_matmul")
def _partial_matmul(smoke: bool) -> Case:
    t, n = _block(smoke)
    x, w, rows = normal(t, n), normal(n, n, seed=1), np.arange(t)
    p = np.empty((t, n), np.float32)

    def ours() -> F32:
        matmul.partial_matmul(x, rows, w, p)
        return p

    peers = {"numpy": lambda: x[rows] @ w, **torch_call(lambda t, a, b, r: a[r] @ b, x, w, rows)}
    right = x.astype(np.float64) @ w
    work = Work(macs=t * n * n, bytes=x.nbytes + w.nbytes + p.nbytes)
    return Case(ours, peers, (right,), (linear_bound(x, w.T),), work, parallel=False)


# ---- norms and rotation


@CASES.add("sum_squares")
def _sum_squares(smoke: bool) -> Case:
    x = normal(*_block(smoke))
    ss = np.empty((len(x), 1), np.float32)

    def ours() -> F32:
        norm.sum_squares(x, ss)
        return ss

    peers = {
        "numpy": lambda: (x * x).sum(axis=1, keepdims=True),
        **torch_call(lambda t, v: (v * v).sum(1, keepdim=True), x),
    }
    right = (x.astype(np.float64) ** 2).sum(axis=1, keepdims=True)
    return Case(ours, peers, (right,), (relative(right, 2 * np.sqrt(x.shape[1])),), Work(macs=x.size, bytes=x.nbytes), parallel=False)


@CASES.add("rms_scale")
def _rms_scale(smoke: bool) -> Case:
    t, n = _block(smoke)
    x, weight = normal(t, n), normal(1, n, seed=1)
    total, size = (x * x).sum(axis=1, keepdims=True), np.float32(n)
    out = np.empty_like(x)

    def ours() -> F32:
        norm.rms_scale(x, total, weight, size, EPS, out)
        return out

    def torch(t: Any, of: Any) -> Call:
        a, b, w = of(x), of(total), of(weight)
        return lambda: a * t.rsqrt(b / float(size) + float(EPS)) * w

    peers = {"numpy": lambda: x * (1 / np.sqrt(total / size + EPS)) * weight, **torch_side(torch)}
    right = x.astype(np.float64) / np.sqrt(total.astype(np.float64) / n + EPS) * weight
    return Case(ours, peers, (right,), (relative(right, 8),), Work(bytes=2 * x.nbytes), parallel=False)


@CASES.add("sum_features")
def _sum_features(smoke: bool) -> Case:
    x = normal(*_block(smoke))
    s = np.empty((len(x), 1), np.float32)

    def ours() -> F32:
        layer_norm.sum_features(x, s)
        return s

    peers = {"numpy": lambda: x.sum(axis=1, keepdims=True), **torch_call(lambda t, v: v.sum(1, keepdim=True), x)}
    right = x.astype(np.float64).sum(axis=1, keepdims=True)
    bound = sum_bound(x.shape[1], np.abs(x).sum(axis=1, keepdims=True))
    return Case(ours, peers, (right,), (bound,), Work(bytes=x.nbytes), parallel=False)


@CASES.add("sum_squared_deviations")
def _sum_squared_deviations(smoke: bool) -> Case:
    x = normal(*_block(smoke))
    total, size, ss = x.sum(axis=1, keepdims=True), np.float32(x.shape[1]), np.empty((len(x), 1), np.float32)

    def ours() -> F32:
        layer_norm.sum_squared_deviations(x, total, size, ss)
        return ss

    def torch(t: Any, of: Any) -> Call:
        a, b = of(x), of(total)
        return lambda: ((a - b / float(size)) ** 2).sum(1, keepdim=True)

    peers = {"numpy": lambda: ((x - total / size) ** 2).sum(axis=1, keepdims=True), **torch_side(torch)}
    right = ((x.astype(np.float64) - total.astype(np.float64) / size) ** 2).sum(axis=1, keepdims=True)
    work = Work(macs=x.size, bytes=x.nbytes)
    return Case(ours, peers, (right,), (relative(right, 2 * np.sqrt(x.shape[1]) + 4),), work, parallel=False)


@CASES.add("layer_scale")
def _layer_scale(smoke: bool) -> Case:
    t, n = _block(smoke)
    x, weight, size = normal(t, n), normal(1, n, seed=1), np.float32(n)
    total = x.sum(axis=1, keepdims=True)
    squares, out = ((x - total / size) ** 2).sum(axis=1, keepdims=True), np.empty_like(x)

    def ours() -> F32:
        layer_norm.layer_scale(x, total, squares, weight, size, EPS, out)
        return out

    def torch(t: Any, of: Any) -> Call:
        a, b, c, w = of(x), of(total), of(squares), of(weight)
        return lambda: (a - b / float(size)) * t.rsqrt(c / float(size) + float(EPS)) * w

    peers = {"numpy": lambda: (x - total / size) * (1 / np.sqrt(squares / size + EPS)) * weight, **torch_side(torch)}
    mean, scale = total.astype(np.float64) / n, weight / np.sqrt(squares.astype(np.float64) / n + EPS)
    right = (x.astype(np.float64) - mean) * scale
    bound = relative(right, 8) + U * np.abs(mean * scale)
    return Case(ours, peers, (right,), (bound,), Work(bytes=2 * x.nbytes), parallel=False)


def _heads(smoke: bool) -> tuple[int, int, int]:
    """Tokens, query slots for each key/value head, pair units of one whole head on a core."""
    return (3, 2, 4) if smoke else (16, 4, 16)


@CASES.add("head_squares")
def _head_squares(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    qkv = normal(t, units * (q + 2) * 2)
    split = qkv.reshape(t, units, q + 2, 2)
    ss = np.empty((t, q + 1), np.float32)

    def ours() -> F32:
        head_norm.head_squares(qkv, q, ss)
        return ss

    peers = {
        "numpy": lambda: (split[:, :, : q + 1] ** 2).sum(axis=(1, 3)),
        **torch_call(lambda t, v: (v[:, :, : q + 1] ** 2).sum((1, 3)), split),
    }
    right = (split[:, :, : q + 1].astype(np.float64) ** 2).sum(axis=(1, 3))
    work = Work(macs=t * units * 2 * (q + 1), bytes=qkv.nbytes)
    return Case(ours, peers, (right,), (relative(right, 2 * np.sqrt(2 * units)),), work, parallel=False)


@CASES.add("head_scale")
def _head_scale(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before = normal(t, units * (q + 2) * 2)
    split = before.reshape(t, units, q + 2, 2)
    total = (split[:, :, : q + 1] ** 2).sum(axis=(1, 3))
    q_weight, k_weight = normal(1, 2 * units, seed=1), normal(1, 2 * units, seed=2)
    size, qkv = np.float32(2 * units), before.copy()
    # Of each slot: the queries share a weight, the key has its own.
    weights = np.stack([q_weight.reshape(units, 2)] * q + [k_weight.reshape(units, 2)], axis=1)
    right = split.astype(np.float64)
    right[:, :, : q + 1] *= (1 / np.sqrt(total.astype(np.float64) / size + EPS))[:, None, :, None] * weights

    def ours() -> F32:
        qkv[...] = before
        head_norm.head_scale(qkv, total, q_weight, k_weight, q, size, EPS)
        return qkv

    def numpy() -> F32:
        result = before.copy()
        result.reshape(split.shape)[:, :, : q + 1] *= (1 / np.sqrt(total / size + EPS))[:, None, :, None] * weights
        return result

    def torch(t: Any, of: Any) -> Call:
        source, sums, w = of(split), of(total), of(weights)

        def call() -> Any:
            result = source.clone()
            result[:, :, : q + 1] *= t.rsqrt(sums / float(size) + float(EPS))[:, None, :, None] * w
            return result.reshape(len(result), -1)

        return call

    peers = {"numpy": numpy, **torch_side(torch)}
    right = right.reshape(qkv.shape)
    return Case(ours, peers, (right,), (relative(right, 8),), Work(bytes=2 * qkv.nbytes), parallel=False)


@CASES.add("head_scale_plain")
def _head_scale_plain(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before = normal(t, units * (q + 2) * 2)
    split = before.reshape(t, units, q + 2, 2)
    total = (split[:, :, : q + 1] ** 2).sum(axis=(1, 3))
    size, qkv = np.float32(2 * units), before.copy()
    right = split.astype(np.float64)
    right[:, :, : q + 1] *= (1 / np.sqrt(total.astype(np.float64) / size + EPS))[:, None, :, None]

    def ours() -> F32:
        qkv[...] = before
        head_norm.head_scale_plain(qkv, total, q, size, EPS)
        return qkv

    def by_formula(x: Any, factor: Any) -> Any:
        x[:, :, : q + 1] *= factor[:, None, :, None]
        return x.reshape(before.shape)

    def torch(t: Any, of: Any) -> Call:
        source, sums = of(split), of(total)
        return lambda: by_formula(source.clone(), t.rsqrt(sums / float(size) + float(EPS)))

    peers = {"numpy": lambda: by_formula(split.copy(), 1 / np.sqrt(total / size + EPS)), **torch_side(torch)}
    right = right.reshape(qkv.shape)
    return Case(ours, peers, (right,), (relative(right, 8),), Work(bytes=2 * qkv.nbytes), parallel=False)


@CASES.add("tune_queries")
def _tune_queries(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before, factor = normal(t, units * (q + 2) * 2), 1 + np.abs(normal(t, 1, seed=1))
    split, qkv = before.reshape(t, units, q + 2, 2), before.copy()

    def ours() -> F32:
        qkv[...] = before
        query_temperature.tune_queries(qkv, factor, q)
        return qkv

    def by_formula(x: Any, of_token: Any) -> Any:
        x[:, :, :q] *= of_token[:, :, None, None]
        return x.reshape(before.shape)

    peers = {"numpy": lambda: by_formula(split.copy(), factor), **torch_call(lambda t, x, f: by_formula(x.clone(), f), split, factor)}
    right = by_formula(split.astype(np.float64), factor)
    return Case(ours, peers, (right,), (relative(right, 2),), Work(bytes=2 * qkv.nbytes), parallel=False)


def _index_sizes(smoke: bool) -> tuple[int, int, int]:
    """Keys, tokens of a tile, heads of an indexer."""
    return (6, 2, 3) if smoke else (256, 4, 64)


def _order(smoke: bool) -> tuple[Any, Any, Any]:
    """Scores (n_keys, t), their order numbers, and a threshold that half of them reach."""
    n, t, _ = _index_sizes(smoke)
    scores = np.abs(normal(n, t))
    order = scores.view(np.int32)  # of positive ones, their bits
    return scores, order, np.sort(order, axis=0)[n // 2].copy()


@CASES.add("index_scores")
def _index_scores(smoke: bool) -> Case:
    n, t, heads = _index_sizes(smoke)
    s_t, weights = normal(n, heads * t), np.abs(normal(t, heads, seed=1))
    scores, scale = np.empty((n, t), np.float32), np.float32(0.1)

    def ours() -> F32:
        scores[:] = 0
        index_keys.index_scores(s_t, weights, 0, scale, scale, scores)
        return scores

    def by_formula(s: Any, w: Any) -> Any:
        return np.einsum("jhi,ih->ji", np.maximum(s.reshape(n, heads, t) * scale, 0), w * scale)

    def torch(t_: Any, of: Any) -> Call:
        s, w = of(s_t), of(weights)
        return lambda: t_.einsum("jhi,ih->ji", (s.reshape(n, heads, t) * 0.1).relu(), w * 0.1)

    right = by_formula(s_t.astype(np.float64), weights.astype(np.float64))
    peers = {"numpy": lambda: by_formula(s_t, weights), **torch_side(torch)}
    return Case(ours, peers, (right,), (relative(right, 2 * heads),), Work(macs=s_t.size, bytes=s_t.nbytes), parallel=False)


@CASES.add("order_scores")
def _order_scores(smoke: bool) -> Case:
    n, t, _ = _index_sizes(smoke)
    scores, order = normal(n, t), np.empty((n, t), np.int32)
    admitted = np.full(n, (1 << t) - 1)

    def ours() -> Any:
        index_keys.order_scores(scores, admitted, order)
        return order

    def by_formula(x: Any) -> Any:
        bits = x.view(np.int32)
        return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    peers = {"numpy": lambda: by_formula(scores)}
    return Case(ours, peers, (by_formula(scores),), (0.0,), Work(bytes=2 * scores.nbytes), parallel=False)


@CASES.add("count_reaching")
def _count_reaching(smoke: bool) -> Case:
    _, order, threshold = _order(smoke)
    counts = np.empty(threshold.size, np.int32)

    def ours() -> Any:
        index_keys.count_reaching(order, threshold, 1, counts)
        return counts

    peers = {"numpy": lambda: (order >= threshold + 1).sum(axis=0), **torch_call(lambda t, o, m: (o >= m + 1).sum(0), order, threshold)}
    right = (order.astype(np.int64) > threshold).sum(axis=0)
    return Case(ours, peers, (right,), (0,), Work(bytes=order.nbytes), parallel=False)


@CASES.add("add_counts, raise_threshold and count_wanted")
def _thresholds(smoke: bool) -> Case:
    t = _index_sizes(smoke)[1]
    own, of_above = np.arange(t, dtype=np.int32), np.full(t, 5, np.int32)
    total, threshold, wanted = (np.zeros(t, np.int32) for _ in range(3))

    def ours() -> Any:
        total[:], threshold[:] = own, 0
        index_keys.add_counts(total, of_above)
        index_keys.raise_threshold(total, 8, 99, 6, threshold)
        index_keys.count_wanted(total, 99, 6, wanted)
        return total, threshold, wanted

    def numpy() -> Any:
        both = own + of_above
        return both, np.where(both >= 6, 8, 0), 6 - both

    right = tuple(v.astype(np.int64) for v in numpy())
    return Case(ours, {"numpy": numpy}, right, (0, 0, 0), Work(bytes=own.nbytes), parallel=False)


@CASES.add("take_keys")
def _take_keys(smoke: bool) -> Case:
    _, order, threshold = _order(smoke)
    t, taken = threshold.size, np.empty(len(order), np.int64)
    before, wanted = np.zeros(t, np.int32), np.ones(t, np.int32)

    def ours() -> Any:
        before[:] = 0
        index_keys.take_keys(order, threshold, before, wanted, taken)
        return taken

    def numpy() -> Any:
        first = (order == threshold) & ((order == threshold).cumsum(axis=0) <= wanted)
        return (((order > threshold) | first).astype(np.int64) << np.arange(t)).sum(axis=1)

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(bytes=order.nbytes), parallel=False)


@CASES.add("qk_squares")
def _qk_squares(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    qkv = normal(t, units * (q + 2) * 2)
    split = qkv.reshape(t, units, q + 2, 2)
    ss = np.empty((t, 2), np.float32)

    def ours() -> F32:
        qk_norm.qk_squares(qkv, q, ss)
        return ss

    def by_formula(x: Any) -> Any:
        return np.stack([(x[:, :, :q] ** 2).sum(axis=(1, 2, 3)), (x[:, :, q] ** 2).sum(axis=(1, 2))], axis=1)

    def torch(t_: Any, of: Any) -> Call:
        x = of(split)
        return lambda: t_.stack([(x[:, :, :q] ** 2).sum((1, 2, 3)), (x[:, :, q] ** 2).sum((1, 2))], 1)

    right = by_formula(split.astype(np.float64))
    work = Work(macs=t * units * 2 * (q + 1), bytes=qkv.nbytes)
    peers = {"numpy": lambda: by_formula(split), **torch_side(torch)}
    return Case(ours, peers, (right,), (relative(right, 2 * np.sqrt(2 * units * q)),), work, parallel=False)


@CASES.add("qk_scale")
def _qk_scale(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before = normal(t, units * (q + 2) * 2)
    split = before.reshape(t, units, q + 2, 2)
    total = np.stack([(split[:, :, :q] ** 2).sum(axis=(1, 2, 3)), (split[:, :, q] ** 2).sum(axis=(1, 2))], axis=1)
    q_weight, k_weight = normal(1, units * q * 2, seed=1), normal(1, units * 2, seed=2)
    sizes, qkv = (np.float32(units * q * 2), np.float32(units * 2)), before.copy()
    weights = np.concatenate([q_weight.reshape(units, q, 2), k_weight.reshape(units, 1, 2)], axis=1)
    of_slot = np.array([0] * q + [1])

    def factors(sums: Any) -> Any:
        return (1 / np.sqrt(sums / np.array(sizes, sums.dtype) + sums.dtype.type(EPS)))[:, None, of_slot, None]

    def ours() -> F32:
        qkv[...] = before
        qk_norm.qk_scale(qkv, total, q_weight, k_weight, q, *sizes, EPS)
        return qkv

    def by_formula(x: Any, sums: Any) -> Any:
        result = x.copy()
        result[:, :, : q + 1] *= factors(sums) * weights
        return result.reshape(before.shape)

    def torch(t_: Any, of: Any) -> Call:
        x, sums, w, size = of(split), of(total), of(weights), of(np.array(sizes, np.float32))

        def call() -> Any:
            result = x.clone()
            result[:, :, : q + 1] *= t_.rsqrt(sums / size + float(EPS))[:, None, of_slot, None] * w
            return result.reshape(len(result), -1)

        return call

    right = by_formula(split.astype(np.float64), total.astype(np.float64))
    peers = {"numpy": lambda: by_formula(split, total), **torch_side(torch)}
    return Case(ours, peers, (right,), (relative(right, 8),), Work(bytes=2 * qkv.nbytes), parallel=False)


@CASES.add("rotate_qk")
def _rotate_qk(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before = normal(t, units * (q + 2) * 2)
    angle = np.random.default_rng(1).uniform(0, 6, (t, units))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    qkv, split = before.copy(), before.reshape(t, units, q + 2, 2)

    def rotated(x: Any, co: Any, si: Any) -> Any:
        out = x.clone() if hasattr(x, "clone") else x.copy()
        a, b = x[:, :, : q + 1, 0], x[:, :, : q + 1, 1]
        out[:, :, : q + 1, 0] = a * co[:, :, None] - b * si[:, :, None]
        out[:, :, : q + 1, 1] = b * co[:, :, None] + a * si[:, :, None]
        return out.reshape(t, -1)

    def ours() -> F32:
        rope.rotate_qk(qkv, cos, sin, q)
        return qkv

    peers = {
        "numpy": lambda: rotated(split, cos, sin),
        **torch_call(lambda t, v, c, s: rotated(v, c, s), split, cos, sin),
    }
    right = rotated(split.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64))
    bound = 4 * U * rotated(np.abs(split).astype(np.float64), np.abs(cos), -np.abs(sin)).max()
    work = Work(macs=2 * t * units * (q + 1), bytes=2 * qkv.nbytes)
    return Case(ours, peers, (right,), (bound,), work, parallel=False)


@CASES.add("rotate_slots")
def _rotate_slots(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    before = normal(t, units * q * 2)
    angle = np.random.default_rng(1).uniform(0, 6, (t, units))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x, split = before.copy(), before.reshape(t, units, q, 2)

    def rotated(x: Any, co: Any, si: Any) -> Any:
        out = x.clone() if hasattr(x, "clone") else x.copy()
        a, b = x[..., 0], x[..., 1]
        out[..., 0], out[..., 1] = a * co[:, :, None] - b * si[:, :, None], b * co[:, :, None] + a * si[:, :, None]
        return out.reshape(t, -1)

    def ours() -> F32:
        x[...] = before
        head_slots.rotate_slots(x, cos, sin)
        return x

    peers = {"numpy": lambda: rotated(split, cos, sin), **torch_call(lambda t, v, c, s: rotated(v, c, s), split, cos, sin)}
    right = rotated(split.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64))
    bound = 4 * U * rotated(np.abs(split).astype(np.float64), np.abs(cos), -np.abs(sin)).max()
    return Case(ours, peers, (right,), (bound,), Work(macs=2 * t * units * q, bytes=2 * x.nbytes), parallel=False)


@CASES.add("take_slot")
def _take_slot(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    x, out = normal(t, units * q * 2), np.empty((t, units * 2), np.float32)
    split = x.reshape(t, units, q, 2)

    def ours() -> F32:
        head_slots.take_slot(x, 1, out)
        return out

    peers = {
        "numpy": lambda: np.ascontiguousarray(split[:, :, 1]).reshape(t, -1),
        **torch_call(lambda t_, v: v[:, :, 1].reshape(t, -1), split),
    }
    return Case(ours, peers, (split[:, :, 1].reshape(t, -1),), (0,), Work(bytes=2 * out.nbytes), parallel=False)


@CASES.add("put_slots")
def _put_slots(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    x, out = normal(t, units * 2), np.zeros((t, units * (q + 1) * 2), np.float32)
    peer = {"numpy": out.copy().reshape(t, units, q + 1, 2)}

    def ours() -> F32:
        head_slots.put_slots(x, 1, 1, q + 1, 0, out)
        return out

    def numpy() -> F32:
        peer["numpy"][:, :, 1] = x.reshape(t, units, 2)
        return peer["numpy"].reshape(t, -1)

    def torch(t_: Any, of: Any) -> Call:
        store, source = of(np.zeros((t, units, q + 1, 2), np.float32)), of(x.reshape(t, units, 2))

        def call() -> Any:
            store[:, :, 1] = source
            return store.reshape(t, -1)

        return call

    right = np.zeros((t, units, q + 1, 2))
    right[:, :, 1] = x.reshape(t, units, 2)
    peers = {"numpy": numpy, **torch_side(torch)}
    return Case(ours, peers, (right.reshape(t, -1),), (0,), Work(bytes=2 * x.nbytes), parallel=False)


@CASES.add("attend_listed")
def _attend_listed(smoke: bool) -> Case:
    """Latent attention over listed keys: rows of 512 + 64, of which 512 are the value, 16 heads, 2,048 keys of 8,192."""
    t, heads, d, d_v, n_keys, topk = (2, 2, 6, 4, 9, 5) if smoke else (2, 16, 576, 512, 8192, 2048)
    q, kv = normal(t, heads * d), normal(n_keys, d, seed=1)
    lists = np.stack([np.random.default_rng(i).permutation(n_keys)[:topk] for i in range(t)]).astype(np.int32)
    lists[:, -1] = -1
    scale, none, everything = np.float32(d**-0.5), np.zeros(0, np.float32), np.zeros(0, np.int32)
    work, out = np.empty((d + d_v + topk, heads), np.float32), np.empty((t, heads * d_v), np.float32)
    m, lse = np.empty((t, heads), np.float32), np.empty((t, heads), np.float32)

    def ours() -> Any:
        attend_listed(q, kv, lists, everything, none, scale, work, out, m, lse)
        return out

    def by_formula(q: Any, kv: Any) -> Any:
        keys = kv[lists[:, :-1]]
        s = np.einsum("thd,tjd->thj", q.reshape(t, heads, d), keys) * q.dtype.type(scale)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return ((p @ keys[..., :d_v]) / p.sum(axis=-1, keepdims=True)).reshape(t, -1)

    def torch(t_: Any, of: Any) -> Call:
        a, b, chosen = of(q).view(t, heads, 1, d), of(kv), of(lists[:, :-1].astype(np.int64))

        def call() -> Any:
            keys = b[chosen][:, None]
            return t_.nn.functional.scaled_dot_product_attention(a, keys, keys[..., :d_v]).reshape(t, -1)

        return call

    right = by_formula(q.astype(np.float64), kv.astype(np.float64))
    peers = {"numpy": lambda: by_formula(q, kv), **torch_side(torch)}
    macs = t * heads * (topk - 1) * (d + d_v)
    return Case(ours, peers, (right,), (composed(right),), Work(macs=macs, bytes=t * topk * d * 4, tokens=t), parallel=False)


# ---- routing


def _scores(smoke: bool) -> tuple[F32, int]:
    """Scores (tokens, experts), experts for each token."""
    return (normal(4, 6), 2) if smoke else (normal(64, 32), 4)


def _decision(smoke: bool) -> tuple[Any, F32]:
    """Chosen experts and their weights, (tokens, top_k)."""
    logits, k = _scores(smoke)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k].copy()
    return ids, np.take_along_axis(p, ids, axis=1)


@CASES.add("softmax_topk")
def _softmax_topk(smoke: bool) -> Case:
    logits, k = _scores(smoke)
    probs, ids, weights = np.empty_like(logits), np.empty((len(logits), k), np.int64), np.empty((len(logits), k), np.float32)

    def ours() -> Any:
        routing.softmax_topk(logits, True, probs, ids, weights)
        return ids, weights

    def by_formula(x: Any) -> Any:
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        best = np.argsort(-p, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(p, best, axis=1)
        return best, chosen / chosen.sum(axis=1, keepdims=True)

    def torch(t: Any, of: Any) -> Call:
        v = of(logits)

        def call() -> Any:
            chosen, best = t.topk(t.softmax(v, 1), k, dim=1)
            return best, chosen / chosen.sum(1, keepdim=True)

        return call

    right = by_formula(logits.astype(np.float64))
    peers = {"numpy": lambda: by_formula(logits), **torch_side(torch)}
    return Case(
        ours, peers, right, (0, relative(right[1], 2 * np.sqrt(logits.shape[1]) + 16)), Work(bytes=2 * logits.nbytes), parallel=False
    )


@CASES.add("route_tokens")
def _route_tokens(smoke: bool) -> Case:
    """Sigmoid scores, a correction bias, groups: DeepSeek-V3's rule, with four groups."""
    logits, k = (normal(4, 8), 2) if smoke else _scores(smoke)
    n = logits.shape[1]
    correction, none = normal(1, n, seed=5) * np.float32(0.1), np.zeros((1, 1), np.float32)
    rule = replace(ROUTING_PRESETS["deepseek_v3"], n_group=4, topk_group=2)
    code, work = router_code(rule), np.empty((routing.WORK_ROWS, n), np.float32)
    ids, weights = np.empty((len(logits), k), np.int64), np.empty((len(logits), k), np.float32)

    def ours() -> Any:
        routing.route_tokens(logits, none, correction, code, work, ids, weights)
        return ids, weights

    def by_formula(x: Any) -> Any:
        s = 1 / (1 + np.exp(-x))
        c = (s + correction).reshape(len(x), 4, -1)
        best = np.argsort(-np.sort(c, axis=2)[:, :, -2:].sum(axis=2), axis=1, kind="stable")[:, :2]
        is_open = np.zeros((len(x), 4, 1), np.bool_)
        np.put_along_axis(is_open[:, :, 0], best, True, axis=1)
        chosen = np.argsort(-np.where(is_open, c, -np.inf).reshape(x.shape), axis=1, kind="stable")[:, :k]
        w = np.take_along_axis(s, chosen, axis=1)
        return chosen, 2.5 * w / (w.sum(axis=1, keepdims=True) + 1e-20)

    def torch(t: Any, of: Any) -> Call:
        v, b = of(logits), of(correction)

        def call() -> Any:
            s = t.sigmoid(v)
            c = (s + b).view(len(logits), 4, -1)
            best = t.topk(t.topk(c, 2, dim=2).values.sum(2), 2, dim=1).indices
            is_open = t.zeros(len(logits), 4, dtype=t.bool).scatter_(1, best, True)
            chosen = t.topk(c.masked_fill(~is_open[:, :, None], float("-inf")).flatten(1), k, dim=1).indices
            w = s.gather(1, chosen)
            return chosen, 2.5 * w / (w.sum(1, keepdim=True) + 1e-20)

        return call

    right = by_formula(logits.astype(np.float64))
    peers = {"numpy": lambda: by_formula(logits), **torch_side(torch)}
    return Case(ours, peers, right, (0, relative(right[1], 2 * np.sqrt(k) + 24)), Work(bytes=2 * logits.nbytes), parallel=False)


@CASES.add("sinkhorn_over_experts, sinkhorn_maximum, sinkhorn_sum, sinkhorn_over_tokens, sinkhorn_end")
def _sinkhorn(smoke: bool) -> Case:
    """One round over tokens that meet on one core."""
    logits, _ = _scores(smoke)
    n, none = logits.shape[1], np.zeros((1, 1), np.float32)
    r, top, total = np.empty_like(logits), np.empty(n, np.float32), np.empty(n, np.float32)
    code = router_code(RoutingRule(router_selection_nonlinearity="sinkhorn"))

    def ours() -> Any:
        r[...] = logits
        together.sinkhorn_over_experts(r)
        top.fill(-np.inf)
        together.sinkhorn_maximum(r, top)
        total.fill(0)
        together.sinkhorn_sum(r, top, total)
        together.sinkhorn_over_tokens(r, top, total)
        together.sinkhorn_end(r, none, code)
        return r

    def by_formula(x: Any) -> Any:
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p / p.sum(axis=0)

    def torch(t: Any, of: Any) -> Call:
        v = of(logits)

        def call() -> Any:
            x = v - v.logsumexp(1, keepdim=True)
            return (x - x.logsumexp(0, keepdim=True)).exp()

        return call

    right = by_formula(logits.astype(np.float64))
    peers = {"numpy": lambda: by_formula(logits), **torch_side(torch)}
    return Case(ours, peers, (right,), (relative(right, 200),), Work(bytes=2 * logits.nbytes), parallel=False)


@CASES.add("score_tokens, choose_by_scores, weigh_chosen")
def _choose_by_scores(smoke: bool) -> Case:
    """The steps that `route_tokens` takes at once, apart."""
    logits, k = _scores(smoke)
    none, work = np.zeros((1, 1), np.float32), np.empty((routing.WORK_ROWS, logits.shape[1]), np.float32)
    code = router_code(RoutingRule(router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid"))
    scores, ids, weights = np.empty_like(logits), np.empty((len(logits), k), np.int64), np.empty((len(logits), k), np.float32)

    def ours() -> Any:
        together.score_tokens(logits, none, none, code, scores)
        together.choose_by_scores(scores, code, work, ids)
        together.weigh_chosen(logits, scores, code, work, ids, weights)
        return ids, weights

    def by_formula(x: Any) -> Any:
        s = 1 / (1 + np.exp(-x))
        best = np.argsort(-s, axis=1, kind="stable")[:, :k]
        w = np.take_along_axis(s, best, axis=1)
        return best, w / w.sum(axis=1, keepdims=True)

    right = by_formula(logits.astype(np.float64))
    peers = {"numpy": lambda: by_formula(logits)}
    return Case(ours, peers, right, (0, relative(right[1], 2 * np.sqrt(k) + 24)), Work(bytes=2 * logits.nbytes), parallel=False)


@CASES.add("open_to_tokens, take_room")
def _take_room(smoke: bool) -> Case:
    """Switch: one choice each, the later tokens of a full expert dropped."""
    scores, _ = _scores(smoke)
    n_tokens, n = scores.shape
    rule = ROUTING_PRESETS["switch"]
    code, room, work = router_code(rule), rule.capacity(n_tokens, n, 1), np.empty((routing.WORK_ROWS, n), np.float32)
    tried, ids, taken = np.empty((n_tokens, n), np.int8), np.empty((n_tokens, 1), np.int64), np.empty(n, np.int64)

    def ours() -> Any:
        together.open_to_tokens(scores, code, work, tried, ids)
        taken.fill(0)
        together.take_room(scores, code, room, work, tried, ids, taken)
        return ids

    def numpy() -> Any:
        best = scores.argmax(axis=1)
        before = np.cumsum(best[:, None] == np.arange(n), axis=0)
        return np.where(before[np.arange(n_tokens), best] <= room, best, -1)[:, None]

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(bytes=scores.nbytes), parallel=False)


@CASES.add("count_reaching, settle_bit, count_above, take_highest")
def _take_highest(smoke: bool) -> Case:
    """Every expert takes its highest tokens, found bit by bit."""
    scores, k = _scores(smoke)
    n_tokens, n = scores.shape
    room, ids = n_tokens * k // n, np.empty((n_tokens, n), np.int64)
    bound, count, taken = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)

    def ours() -> Any:
        bound.fill(0)
        for bit in range(31, -1, -1):
            count.fill(0)
            together.count_reaching(scores, bound, bit, count)
            together.settle_bit(count, bit, room, bound)
        count.fill(0)
        together.count_above(scores, bound, count)
        taken.fill(0)
        together.take_highest(scores, bound, count, room, ids, taken)
        return ids

    def numpy() -> Any:
        chosen = np.zeros((n_tokens, n), np.bool_)
        np.put_along_axis(chosen, np.argsort(-scores, axis=0, kind="stable")[:room], True, axis=0)
        return np.where(np.sort(~chosen, axis=1), -1, np.argsort(~chosen, axis=1, kind="stable"))

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(bytes=scores.nbytes), parallel=False)


@CASES.add("assign_experts")
def _assign_experts(smoke: bool) -> Case:
    logits, k = _scores(smoke)
    numbers, n = np.arange(len(logits)) * 7, logits.shape[1]
    ids, weights = np.empty((len(logits), k), np.int64), np.empty((len(logits), k), np.float32)

    def ours() -> Any:
        routing.assign_experts(numbers, n, np.float32(1 / k), ids, weights)
        return ids

    def numpy() -> Any:
        return (numbers[:, None] + np.arange(k)) % n

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(bytes=ids.nbytes), parallel=False)


@CASES.add("select_expert")
def _select_expert(smoke: bool) -> Case:
    ids, weights = _decision(smoke)
    expert = int(ids[0, 0])
    rows, scale, n = np.empty(len(ids), np.int64), np.empty(len(ids), np.float32), np.empty(1, np.int64)

    def ours() -> Any:
        routing.select_expert(ids, weights, expert, rows, scale, n)
        return rows[: n[0]], scale[: n[0]]

    def numpy() -> Any:
        token, slot = np.nonzero(ids == expert)
        return token, weights[token, slot]

    def torch(t: Any, of: Any) -> Call:
        i, w = of(ids), of(weights)

        def call() -> Any:
            token, slot = t.nonzero(i == expert, as_tuple=True)
            return token, w[token, slot]

        return call

    chosen = [(t, s) for t in range(len(ids)) for s in range(ids.shape[1]) if ids[t, s] == expert]
    right = np.array([t for t, _ in chosen]), np.array([weights[t, s] for t, s in chosen])
    return Case(ours, {"numpy": numpy, **torch_side(torch)}, right, (0, 0), Work(bytes=ids.nbytes), parallel=False)


@CASES.add("group_tokens")
def _group_tokens(smoke: bool) -> Case:
    ids, weights = _decision(smoke)
    n_experts = _scores(smoke)[0].shape[1]
    starts, rows, scale = np.empty(n_experts + 1, np.int64), np.empty(ids.size, np.int64), np.empty(ids.size, np.float32)

    def ours() -> Any:
        routing.group_tokens(ids, weights, starts, rows, scale)
        return starts, rows, scale

    def numpy() -> Any:
        order = np.argsort(ids.ravel(), kind="stable")
        begins = np.concatenate([[0], np.cumsum(np.bincount(ids.ravel(), minlength=n_experts))])
        return begins, order // ids.shape[1], weights.ravel()[order]

    def torch(t: Any, of: Any) -> Call:
        i, w = of(ids).reshape(-1), of(weights).reshape(-1)

        def call() -> Any:
            order = t.argsort(i, stable=True)
            begins = t.cat([i.new_zeros(1), t.cumsum(t.bincount(i, minlength=n_experts), 0)])
            return begins, order // ids.shape[1], w[order]

        return call

    lists = [[(t, s) for t in range(len(ids)) for s in range(ids.shape[1]) if ids[t, s] == e] for e in range(n_experts)]
    flat = [pair for pairs in lists for pair in pairs]
    right = np.cumsum([0, *map(len, lists)]), np.array([t for t, _ in flat]), np.array([weights[t, s] for t, s in flat])
    return Case(
        ours, {"numpy": numpy, **torch_side(torch)}, right, (0, 0, 0), Work(bytes=2 * ids.nbytes + 2 * weights.nbytes), parallel=False
    )


@CASES.add("mark_chosen")
def _mark_chosen(smoke: bool) -> Case:
    ids, _ = _decision(smoke)
    n_words = -(-_scores(smoke)[0].shape[1] // 32)
    mask = np.empty(n_words, np.int32)

    def ours() -> Any:
        routing.mark_chosen(ids, mask)
        return mask

    def numpy() -> Any:
        bits = np.zeros(n_words, np.uint32)
        np.bitwise_or.at(bits, ids.ravel() // 32, np.uint32(1) << (ids.ravel() % 32).astype(np.uint32))
        return bits.view(np.int32)

    words = [sum({1 << e % 32 for e in ids.ravel().tolist() if e // 32 == w}) for w in range(n_words)]
    right = np.array(words, np.uint32).view(np.int32)
    return Case(ours, {"numpy": numpy}, (right,), (0,), Work(bytes=ids.nbytes), parallel=False)


@CASES.add("merge_bits")
def _merge_bits(smoke: bool) -> Case:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 1 << 31, np.prod(_block(smoke)), np.int32) for _ in range(2))
    out = a.copy()

    def ours() -> Any:
        routing.merge_bits(out, b)
        return out

    peers = {"numpy": lambda: a | b, **torch_call(lambda t, x, y: x | y, a, b)}
    right = np.array([x | y for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    return Case(ours, peers, (right,), (0,), Work(bytes=3 * a.nbytes), parallel=False)


# ---- backward: (tokens, features), experts' weights


def _gate_backward(name: str, call: Any, torch: Any, kind: str, clamped: ClampedExperts | None = None) -> None:
    """Gradients of gate and up, in alternate columns, from that of the gated activation; NumPy by the formula."""

    def make(smoke: bool) -> Case:
        t, n = _block(smoke)
        y, dh = normal(t, n), normal(t, n // 2, seed=1)
        dy = np.empty_like(y)
        gate, up, d, none = y[:, ::2].astype(np.float64), y[:, 1::2].astype(np.float64), dh.astype(np.float64), np.zeros(dh.shape)
        slopes = glu_slopes(gate, up, kind, clamped)
        bounds = glu_gradient_bound(gate, up, d, none, none, none, kind, clamped)

        def ours() -> Any:
            call(y, dh, dy)
            return dy[:, ::2], dy[:, 1::2]

        def numpy() -> Any:
            return tuple(dh * slope for slope in glu_slopes(y[:, ::2], y[:, 1::2], kind, clamped))

        def by_torch(t: Any, of: Any) -> Call:
            v, w = of(y).clone().requires_grad_(True), of(dh)

            def run() -> Any:
                v.grad = None
                torch(t, v[:, ::2], v[:, 1::2]).backward(w)
                return v.grad[:, ::2], v.grad[:, 1::2]

            return run

        peers = {"numpy": numpy, **torch_side(by_torch)}
        right = tuple(d * slope for slope in slopes)
        return Case(ours, peers, right, tuple(4 * b for b in bounds), Work(bytes=2 * y.nbytes + dh.nbytes), parallel=False)

    CASES.add(name)(make)


_CLAMP = ClampedExperts(alpha=float(np.float32(1.702)), limit=1.5)
_gate_backward("swiglu_backward", ffn_backward.swiglu_backward, lambda t, g, u: t.nn.functional.silu(g) * u, "silu")
_gate_backward(
    "geglu_backward", ffn_backward.geglu_backward, lambda t, g, u: t.nn.functional.gelu(g, approximate="tanh") * u, "gelu_tanh"
)
_gate_backward(
    "clamped_glu_backward",
    lambda y, dh, dy: ffn_backward.clamped_glu_backward(y, np.float32(_CLAMP.alpha), np.float32(_CLAMP.limit), dh, dy),
    lambda t, g, u: (
        (u.clamp(-_CLAMP.limit, _CLAMP.limit) + 1) * g.clamp(max=_CLAMP.limit) * t.sigmoid(_CLAMP.alpha * g.clamp(max=_CLAMP.limit))
    ),
    "clamped", _CLAMP,
)  # fmt: skip


@CASES.add("add_weight_gradient")
def _add_weight_gradient(smoke: bool) -> Case:
    t, n = _block(smoke)
    x, dy, rows, dw = normal(t, n), normal(t, n, seed=1), np.arange(t), np.empty((n, n), np.float32)
    right = x.astype(np.float64).T @ dy
    bound = 2 * (2 * t**0.5 + 2) * U * (np.abs(x.T.astype(np.float64)) @ np.abs(dy))

    def ours() -> F32:
        dw.fill(0)
        ffn_backward.add_weight_gradient(x, rows, dy, dw)
        return dw

    peers = {"numpy": lambda: x.T @ dy, **torch_call(lambda t, a, b: a.T @ b, x, dy)}
    return Case(ours, peers, (right,), (bound,), Work(macs=t * n * n, bytes=3 * x.nbytes), parallel=False)


_in_place(
    "add_column_sums", lambda x, sums: ffn_backward.add_column_sums(sums, x[:1]),
    lambda x, y: np.concatenate([x[:1] + y.sum(axis=0), x[1:]]), lambda t, x, y: t.cat([x[:1] + y.sum(0), x[1:]]), 130,
    lambda t, n: (t, n),
)  # fmt: skip


@CASES.add("row_products, add_bias_products")
def _row_products(smoke: bool) -> Case:
    t, n = _block(smoke)
    a, b, bias = normal(t, n), normal(t, n, seed=1), normal(1, n, seed=2)
    out = np.empty(t, np.float32)

    def ours() -> F32:
        ffn_backward.row_products(a, b, out)
        ffn_backward.add_bias_products(a, bias, out)
        return out

    right = (a.astype(np.float64) * (b + bias.astype(np.float64))).sum(axis=1)
    bound = 4 * (2 * n) ** 0.5 * U * (np.abs(a.astype(np.float64)) * (np.abs(b) + np.abs(bias))).sum(axis=1)
    peers = {
        "numpy": lambda: (a * b).sum(axis=1) + a @ bias[0],
        **torch_call(lambda t, x, y, z: (x * y).sum(1) + x @ z[0], a, b, bias),
    }
    return Case(ours, peers, (right,), (bound,), Work(macs=2 * t * n, bytes=2 * a.nbytes), parallel=False)


@CASES.add("put_row_products")
def _put_row_products(smoke: bool) -> Case:
    ids, weights = _decision(smoke)
    expert = int(ids[0, 0])
    rows, slot = np.nonzero(ids == expert)
    n = _block(smoke)[1]
    a, b, out = normal(len(rows), n), normal(len(rows), n, seed=1), np.zeros(weights.shape, np.float32)

    def ours() -> F32:
        ffn_backward.put_row_products(a, b, rows, expert, ids, out)
        return out

    def by_formula(x: Any, y: Any) -> Any:
        result = np.zeros(weights.shape, x.dtype)
        result[rows, slot] = (x * y).sum(axis=1)
        return result

    right = by_formula(a.astype(np.float64), b.astype(np.float64))
    bound = 4 * n**0.5 * U * by_formula(np.abs(a.astype(np.float64)), np.abs(b))
    return Case(ours, {"numpy": lambda: by_formula(a, b)}, (right,), (bound,), Work(macs=a.size, bytes=2 * a.nbytes), parallel=False)


@CASES.add("sigmoid_backward")
def _sigmoid_backward(smoke: bool) -> Case:
    x = 2 * normal(int(np.prod(_block(smoke))), 1)
    d, out = normal(len(x), seed=1), np.empty_like(x)

    def ours() -> F32:
        ffn_backward.sigmoid_backward(x, d, out)
        return out[:, 0]

    def by_formula(v: Any) -> Any:
        s = 1 / (1 + np.exp(-v))
        return d * (s * (1 - s))

    wide = x[:, 0].astype(np.float64)
    # 1 - s loses where s is near 1.
    bound = relative(by_formula(wide), 30) + 8 * U * np.abs(d)
    return Case(ours, {"numpy": lambda: by_formula(x[:, 0])}, (by_formula(wide),), (bound,), Work(bytes=3 * x.nbytes), parallel=False)


@CASES.add("keep_rows")
def _keep_rows(smoke: bool) -> Case:
    x = normal(*_block(smoke))
    rows, out = np.arange(0, len(x), 2), x.copy()
    right = x.copy()
    right[1::2] = 0

    def ours() -> F32:
        ffn_backward.keep_rows(rows, out)
        return out

    def numpy() -> F32:
        mask = np.zeros((len(x), 1), np.bool_)
        mask[rows] = True
        return np.where(mask, x, 0)

    return Case(ours, {"numpy": numpy}, (right,), (0,), Work(bytes=x.nbytes), parallel=False)


@CASES.add("put_in_slots")
def _put_in_slots(smoke: bool) -> Case:
    ids, weights = _decision(smoke)
    expert = int(ids[0, 0])
    rows = np.flatnonzero((ids == expert).any(axis=1))
    values, out = normal(len(rows)), np.zeros(weights.shape, np.float32)

    def ours() -> F32:
        ffn_backward.put_in_slots(values, rows, expert, ids, out)
        return out

    def numpy() -> F32:
        result = np.zeros(weights.shape, np.float32)
        result[rows, (ids[rows] == expert).argmax(axis=1)] = values
        return result

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(bytes=values.nbytes), parallel=False)


@CASES.add("route_tokens_backward")
def _route_tokens_backward(smoke: bool) -> Case:
    """Softmax over all experts, weights divided by their sum."""
    logits, k = _scores(smoke)
    ids, _ = _decision(smoke)
    d = normal(len(logits), k, seed=3)
    rule = RoutingRule(null_expert_bias=1.1)
    code, work, out = router_code(rule), np.empty((routing_backward.BACKWARD_ROWS, logits.shape[1]), np.float32), np.empty_like(logits)

    def ours() -> F32:
        routing_backward.route_tokens_backward(logits, ids, d, code, work, out)
        return out

    def numpy() -> F32:
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        chosen = np.take_along_axis(p, ids, axis=1)
        total = chosen.sum(axis=1, keepdims=True) + np.float32(1.1)
        d_chosen = (d - (chosen / total * d).sum(axis=1, keepdims=True)) / total
        wide = np.zeros_like(p)
        np.put_along_axis(wide, ids, d_chosen, axis=1)
        return p * (wide - (p * wide).sum(axis=1, keepdims=True))

    def torch(t: Any, of: Any) -> Call:
        v, i, w = of(logits).clone().requires_grad_(True), of(ids), of(d)

        def call() -> Any:
            v.grad = None
            chosen = t.softmax(v, 1).gather(1, i)
            (chosen / (chosen.sum(1, keepdim=True) + 1.1)).backward(w)
            return v.grad

        return call

    wide, wide_d = logits.astype(np.float64), d.astype(np.float64)
    right = logits_gradient(wide, ids, rule, wide_d)
    bound = 2 * logits_gradient_bound(wide, ids, rule, wide_d, np.zeros(d.shape))
    return Case(ours, {"numpy": numpy, **torch_side(torch)}, (right,), (bound,), Work(bytes=2 * logits.nbytes), parallel=False)


@CASES.add("count_visits, add_balance_backward")
def _balance(smoke: bool) -> Case:
    """Visits of every expert by one sequence, and the gradient of the loss that they are part of."""
    logits, _ = _scores(smoke)
    ids, _ = _decision(smoke)
    t, n = logits.shape
    sequence, counts, out = np.zeros(t, np.int64), np.empty((1, n), np.int64), np.empty_like(logits)
    code, work = router_code(RoutingRule()), np.empty((routing_backward.BACKWARD_ROWS, n), np.float32)

    def ours() -> F32:
        counts.fill(0)
        routing_backward.count_visits(ids, sequence, counts)
        out.fill(0)
        d_scores = (counts * (n / t**2)).astype(np.float32)
        routing_backward.add_balance_backward(logits, sequence, d_scores, routing.SOFTMAX, code, work, out)
        return out

    def by_formula(x: Any) -> Any:
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        d = (np.bincount(ids.ravel(), minlength=n) * (n / t**2)).astype(x.dtype)
        return p * (d - p @ d[:, None])

    right = by_formula(logits.astype(np.float64))
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    bound = (4 * n**0.5 + 64) * U * p * (np.bincount(ids.ravel(), minlength=n) * (n / t**2)).max() * 2
    return Case(ours, {"numpy": lambda: by_formula(logits)}, (right,), (bound,), Work(bytes=2 * logits.nbytes), parallel=False)


# ---- attention: queries (elements, slots * tokens), keys (keys, elements)


@CASES.add("store_kv")
def _store_kv(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    qkv = normal(t, units * (q + 2) * 2)
    split = qkv.reshape(t, units, q + 2, 2)
    k, v = (np.empty((t, 2 * units), np.float32) for _ in range(2))

    def ours() -> Any:
        attention.store_kv(qkv, q, 0, k, v)
        return k, v

    def apart(x: Any) -> Any:
        return x[:, :, q].reshape(t, -1), x[:, :, q + 1].reshape(t, -1)

    right = tuple(
        np.array([[qkv[i, (u * (q + 2) + s) * 2 + e] for u in range(units) for e in range(2)] for i in range(t)]) for s in (q, q + 1)
    )
    peers = {"numpy": lambda: apart(split), **torch_call(lambda t, x: apart(x), split)}
    return Case(ours, peers, right, (0, 0), Work(bytes=4 * k.nbytes), parallel=False)


@CASES.add("pack_queries")
def _pack_queries(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    qkv = normal(t, units * (q + 2) * 2)
    split = qkv.reshape(t, units, q + 2, 2)
    q_t = np.empty((2 * units, q * t), np.float32)

    def ours() -> Any:
        attention.pack_queries(qkv, 0, q, 2, 0, 0, q_t)
        return q_t

    right = np.array([[qkv[i, (f // 2 * (q + 2) + s) * 2 + f % 2] for s in range(q) for i in range(t)] for f in range(2 * units)])
    peers = {
        "numpy": lambda: split[:, :, :q].transpose(1, 3, 2, 0).reshape(2 * units, q * t),
        **torch_call(lambda t_, x: x[:, :, :q].permute(1, 3, 2, 0).reshape(2 * units, q * t), split),
    }
    return Case(ours, peers, (right,), (0,), Work(bytes=2 * q_t.nbytes), parallel=False)


def _visit(smoke: bool) -> tuple[F32, F32, F32, Any]:
    """Keys and values (keys, elements), packed queries, and the tokens that admit each key, as bits: causal, key j from token j on."""
    t, q, units = _heads(smoke)
    admitted = np.array([(1 << t) - (1 << j) for j in range(t)], np.int64)
    return normal(t, 2 * units), normal(t, 2 * units, seed=1), normal(2 * units, q * t, seed=2), admitted


@CASES.add("partial_scores")
def _partial_scores(smoke: bool) -> Case:
    k, _, q_t, _ = _visit(smoke)
    s_t, keys = np.empty((len(k), q_t.shape[1]), np.float32), np.arange(len(k))

    def ours() -> F32:
        attention.partial_scores(k, 0, keys, q_t, s_t)
        return s_t

    peers = {"numpy": lambda: k @ q_t, **torch_call(lambda t, a, b: a @ b, k, q_t)}
    right = k.astype(np.float64) @ q_t
    work = Work(macs=s_t.size * len(q_t), bytes=k.nbytes + q_t.nbytes + s_t.nbytes)
    return Case(ours, peers, (right,), (linear_bound(k, q_t.T),), work, parallel=False)


def _scored(smoke: bool) -> tuple[F32, np.float32, Any, Any, F32]:
    """Scores, their factor, the tokens that admit each key, the same as (keys, slots * tokens), and the maxima."""
    k, _, q_t, admitted = _visit(smoke)
    s_t, scale, tokens = k @ q_t, np.float32(1 / np.sqrt(len(q_t))), np.arange(len(k))
    seen = np.tile(tokens[:, None] <= tokens, (1, q_t.shape[1] // len(k)))
    return s_t, scale, admitted, seen, np.where(seen, s_t * scale, np.float32(-np.inf)).max(axis=0)


@CASES.add("cap_scores")
def _cap_scores(smoke: bool) -> Case:
    s_t, scale, *_ = _scored(smoke)
    cap, capped = np.float32(3.0), s_t.copy()

    def ours() -> F32:
        capped[...] = s_t
        attention.cap_scores(capped, scale, cap)
        return capped

    peers = {
        "numpy": lambda: cap * np.tanh(s_t * scale / cap),
        **torch_call(lambda t, s: float(cap) * t.tanh(s * float(scale) / float(cap)), s_t),
    }
    right = float(scale) * s_t.astype(np.float64)
    bound = capped_bound(right, U * np.abs(right), float(cap))
    return Case(ours, peers, (float(cap) * np.tanh(right / float(cap)),), (bound,), Work(bytes=s_t.nbytes), parallel=False)


@CASES.add("score_max")
def _score_max(smoke: bool) -> Case:
    s_t, scale, admitted, seen, top = _scored(smoke)
    m, q, scaled = np.full(s_t.shape[1], -np.inf, np.float32), s_t.shape[1] // len(s_t), s_t.copy()

    def ours() -> F32:
        scaled[...] = s_t
        attention.score_max(scaled, scale, q, admitted, m)
        return m

    def torch(t: Any, of: Any) -> Call:
        s, mask = of(s_t), of(~seen)
        return lambda: (s * float(scale)).masked_fill(mask, float("-inf")).amax(0)

    peers = {"numpy": lambda: np.where(seen, s_t * scale, np.float32(-np.inf)).max(axis=0), **torch_side(torch)}
    return Case(ours, peers, (top.astype(np.float64),), (0,), Work(bytes=s_t.nbytes), parallel=False)


@CASES.add("softmax_accumulate")
def _softmax_accumulate(smoke: bool) -> Case:
    return _accumulated(smoke, attention.softmax_accumulate, 0.0)


@CASES.add("softmax_accumulate_rounded")
def _softmax_accumulate_rounded(smoke: bool) -> Case:
    largest = np.zeros(1, np.int32)

    def rounded(s_t: F32, q: int, keys: Any, admitted: Any, m: F32, v: F32, f0: int, denom: F32, o_t: F32) -> None:
        attention_rounded.softmax_accumulate_rounded(s_t, q, keys, admitted, m, v, f0, storage.TO_F16, largest, denom, o_t)

    return _accumulated(smoke, rounded, 2.0**-11)


def _accumulated(smoke: bool, accumulate: Any, u_state: float) -> Case:
    """Softmax of a block of keys by `accumulate`, whose state is rounded to `u_state` after every key."""
    s_t, scale, admitted, seen, m = _scored(smoke)
    _, v, _, _ = _visit(smoke)
    scaled, keys, q = s_t * scale, np.arange(len(s_t)), s_t.shape[1] // len(s_t)
    weights, denom, o_t = s_t.copy(), np.zeros(m.size, np.float32), np.zeros((v.shape[1], m.size), np.float32)

    def ours() -> Any:
        weights[...], denom[...], o_t[...] = scaled, 0, 0
        accumulate(weights, q, keys, admitted, m, v, 0, denom, o_t)
        return denom, o_t

    def by_formula(s: Any, top: Any, values: Any) -> Any:
        p = np.where(seen, np.exp(np.where(seen, s * s.dtype.type(scale) - top, 0)), s.dtype.type(0))
        return p.sum(axis=0), values.T @ p

    def torch(t: Any, of: Any) -> Call:
        s, top, values, mask = of(s_t), of(m), of(v), of(~seen)

        def call() -> Any:
            p = t.exp((s * float(scale)).masked_fill(mask, float("-inf")) - top)
            return p.sum(0), values.T @ p

        return call

    right = by_formula(s_t.astype(np.float64), m.astype(np.float64), v.astype(np.float64))
    # The argument of exp is rounded twice; its error is relative to the largest score.
    of_exp = (4 + 2 * float(np.abs(s_t * scale).max())) * U
    n = 2 * np.sqrt(len(s_t)) * U
    size = by_formula(s_t.astype(np.float64), m.astype(np.float64), np.abs(v).astype(np.float64))
    # Every term is rounded, and every partial sum, which is at most the sum of its terms' sizes.
    bounds = tuple((n + of_exp + (1 + len(s_t)) * u_state) * x for x in size)
    work = Work(macs=int(seen.sum()) * v.shape[1], bytes=s_t.nbytes + v.nbytes + o_t.nbytes)
    return Case(ours, {"numpy": lambda: by_formula(s_t, m, v), **torch_side(torch)}, right, bounds, work, parallel=False)


@CASES.add("start_max")
def _start_max(smoke: bool) -> Case:
    t, q, _ = _heads(smoke)
    sink, m = normal(q), np.empty(q * t, np.float32)

    def ours() -> F32:
        attention.start_max(sink, m)
        return m

    peers = {"numpy": lambda: np.repeat(sink, t), **torch_call(lambda t_, x: x.repeat_interleave(t), sink)}
    return Case(ours, peers, (np.array([x for x in sink for _ in range(t)]),), (0,), Work(bytes=m.nbytes), parallel=False)


@CASES.add("start_denominator")
def _start_denominator(smoke: bool) -> Case:
    t, q, _ = _heads(smoke)
    sink, denom = normal(q), np.empty(q * t, np.float32)
    m = np.repeat(sink, t) + np.abs(normal(q * t, seed=1))

    def ours() -> F32:
        attention.start_denominator(sink, m, denom)
        return denom

    right = np.exp(np.repeat(sink, t).astype(np.float64) - m)
    peers = {
        "numpy": lambda: np.exp(np.repeat(sink, t) - m),
        **torch_call(lambda t_, x, top: (x.repeat_interleave(t) - top).exp(), sink, m),
    }
    # The argument is rounded once, relative to itself; then one unit in the last place of the exponential.
    bound = right * (2 + np.abs(np.log(right))) * U
    return Case(ours, peers, (right,), (bound,), Work(bytes=denom.nbytes), parallel=False)


@CASES.add("finish")
def _finish(smoke: bool) -> Case:
    t, q, units = _heads(smoke)
    o_t, denom = normal(2 * units, q * t), np.abs(normal(q * t, seed=1)) + 1
    context = np.empty((t, units * q * 2), np.float32)

    def ours() -> F32:
        attention.finish(o_t, denom, q, 0, 0, context)
        return context

    def numpy(o: Any = o_t, d: Any = denom) -> Any:
        return (o / d).reshape(units, 2, q, t).transpose(3, 0, 2, 1).reshape(t, -1)

    def torch(t_: Any, of: Any) -> Call:
        o, d = of(o_t), of(denom)
        return lambda: (o / d).reshape(units, 2, q, t).permute(3, 0, 2, 1).reshape(t, -1)

    right = np.empty(context.shape)
    for i, u, s, e in np.ndindex(t, units, q, 2):
        right[i, (u * q + s) * 2 + e] = float(o_t[2 * u + e, s * t + i]) / float(denom[s * t + i])
    peers = {"numpy": numpy, **torch_side(torch)}
    return Case(ours, peers, (right,), (relative(right, 1),), Work(bytes=2 * o_t.nbytes), parallel=False)
