"""Every mesh layer, and the drivers under them, beside NumPy and torch: a prompt of 512 tokens and one more token, on 32 x 32 cores.

    pytest benchmarks/bench_layers.py --benchmark-only

One layer of a mid-size mixture of experts: hidden 1024, 16 heads of 64, 4 key/value heads, 32 experts of 512, top-4, vocabulary 8192. A
layer's call places, computes and writes in the ledger; its peers compute the same from arrays of their own layout. With one token the
weights of a small layer stay in the CPU's cache, on every side; `bench_mesh_matmul` takes them from memory. What a layer only counts in
the batched executor, whose replicas are stored once (gathering feature bands), has no time of its own to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from benchmarks.cases import F32, Cases, composed, normal, relative, torch_call, torch_side
from benchmarks.mesh import EPS, Layer, alternate, gathered, put, room, streamed
from benchmarks.racing import Call, Case, Race, Work
from wse_emu.engine.plan import sequences_of
from wse_emu.equivalence.tolerance import U, layer_norm_bound, linear_bound, rms_norm_bound
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING, RoutingRule
from wse_emu.layers.assigned_routing import assign
from wse_emu.layers.attention import attention
from wse_emu.layers.edges import logits
from wse_emu.layers.elementwise import bias, cap, clip, gate_rows
from wse_emu.layers.ffn import FfnWeights, dense_ffn, experts_ffn
from wse_emu.layers.ffn_backward import BackwardWeights, dense_ffn_backward, experts_ffn_backward
from wse_emu.layers.head_groups import query_groups
from wse_emu.layers.head_norm import head_norm
from wse_emu.layers.head_products import head_products
from wse_emu.layers.index_keys import choose_keys, index_heads, weights_column
from wse_emu.layers.kv_cache import KVCache
from wse_emu.layers.layer_norm import layer_norm
from wse_emu.layers.linear import Selection, all_gather_bands, matmul, matmul_by_kind
from wse_emu.layers.norm import add_residual, rms_norm, stream_vector
from wse_emu.layers.qk_norm import qk_norm
from wse_emu.layers.query_temperature import place_factors
from wse_emu.layers.rotary import ROTATE_QK, place_rotary
from wse_emu.layers.router import RouterWeights, report_chosen, route
from wse_emu.layers.router_backward import RouterMatrices, router_backward, share_split
from wse_emu.layers.stream import StreamedHeads
from wse_emu.layers.tiles import move_tokens
from wse_emu.layers.weight_gradient import weight_gradient
from wse_emu.wafer.placement import Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_kernels.attention_mesh import mesh_attention, mesh_store_kv
from wse_kernels.attention_rounded import mesh_attention_rounded
from wse_kernels.head_norm import mesh_head_norm
from wse_kernels.index_keys import mesh_index_keys
from wse_kernels.norm import mesh_rms_norm
from wse_kernels.storage import TO_F16

CASES = Cases()


@pytest.mark.parametrize("name", CASES.keys())
def test_layer(name: str, race: Race, smoke: bool) -> None:
    race.case(CASES[name](smoke))


def test_a_window_of_256_among_4096_tokens(race: Race, smoke: bool) -> None:
    """A window beside the same layer without one: what is not admitted is not computed, and that shows in time."""
    layer, window, last = (Layer.tiny(40, 0), 4, 8) if smoke else (Layer(4096, 0), 256, 64)
    wafer = wse.Wafer(replace(wse.WSE3, sram_bytes_per_core=1 << 20), rows=layer.rows, cols=layer.cols)
    cache, sequences = layer.cache_with(wafer)
    placed = put(wafer, layer.qkv, layer.heads.qkv)
    cache.append(0, placed, sequences, layer.bands)
    context = room(wafer, layer.n_tokens, layer.heads.context)
    q, k, v = layer.published(layer.qkv.astype(np.float64))
    query, key = np.arange(layer.n_tokens)[-last:, None], np.arange(layer.n_tokens)

    def attend(pattern: AttentionPattern) -> F32:
        attention(wafer, placed, context, cache, 0, sequences, layer.bands, pattern=pattern)
        return context.flat

    for pattern, width in ((AttentionPattern(window=window), window), (FULL, layer.n_tokens)):
        attend(pattern)
        found = layer.context_heads(gathered(context))[-last:]
        for head in range(q.shape[1]):
            scores = q[-last:, head] @ k[:, head // layer.q].T * layer.head_dim**-0.5
            p = np.where((key <= query) & (query - key < width), np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
            right = p @ v[:, head // layer.q] / p.sum(axis=1, keepdims=True)
            assert np.abs(found[:, head] - right).max() <= 4 * composed(right)
    pairs = window * layer.n_tokens - window * (window - 1) // 2
    work = Work(macs=2 * pairs * layer.n_kv * layer.q * layer.head_dim, tokens=layer.n_tokens)
    row = race(lambda: attend(AttentionPattern(window=window)), {"no window": lambda: attend(FULL)}, work)
    assert smoke or row.ratio("no window") >= 5, f"a window is only {row.ratio('no window'):.1f} times as fast"


def both(name: str) -> Callable[[Callable[[Layer], Case]], Callable[[Layer], Case]]:
    """Decorator: the case for a prompt and for one more token."""

    def keep(make: Callable[[Layer], Case]) -> Callable[[Layer], Case]:
        CASES.add(f"{name}, prompt")(lambda smoke: _computed(make(Layer.prefill(smoke))))
        CASES.add(f"{name}, token")(lambda smoke: _computed(make(Layer.decode(smoke))))
        return make

    return keep


def _computed(case: Case) -> Case:
    """The case with its numbers computed, which a layer may leave to helpers."""

    def ours() -> Any:
        out = case.ours()
        for result in out if isinstance(out, tuple) else (out,):
            if isinstance(result, PlacedTensor):
                result.wafer.pending.finish()
        return out

    return replace(case, ours=ours)


# ---- in and out, norms, sums


@both("inject and drain")
def _edges(layer: Layer) -> Case:
    wafer, x = layer.wafer(), layer.x
    place = put(wafer, x)

    def ours() -> F32:
        wafer.inject(place, x)
        return wafer.drain(place)

    peers = {"numpy": lambda: x.copy().copy(), **torch_call(lambda t, v: v.clone().clone(), x)}
    return Case(ours, peers, (x,), (0,), Work(bytes=4 * x.nbytes, tokens=layer.n_tokens))


@both("rms_norm")
def _rms_norm(layer: Layer) -> Case:
    return _norm_case(layer, lambda wafer, x, weight, out: rms_norm(wafer, x, "norm", weight, EPS, out, layer.bands))


@both("mesh_rms_norm")
def _mesh_rms_norm(layer: Layer) -> Case:
    size, eps, starts = np.float32(layer.hidden), np.float32(EPS), Split.balanced(layer.hidden, layer.cols).offsets
    return _norm_case(layer, lambda wafer, x, weight, out: mesh_rms_norm(x.flat, layer.n_tokens, starts, weight, size, eps, out.flat))


@both("layer_norm")
def _layer_norm(layer: Layer) -> Case:
    wafer, x, weight = layer.wafer(), layer.x, normal(layer.hidden, seed=1)
    placed, out = put(wafer, x), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))

    def ours() -> Any:
        layer_norm(wafer, placed, "norm", weight, EPS, out, layer.bands)
        return out

    def plain(v: Any) -> Any:
        d = v - v.mean(axis=1, keepdims=True)
        return d / np.sqrt((d * d).mean(axis=1, keepdims=True) + v.dtype.type(EPS)) * weight

    def torch(t: Any, of: Any) -> Call:
        v, w = of(x), of(weight)
        return lambda: t.nn.functional.layer_norm(v, (layer.hidden,), w, None, EPS)

    x64 = x.astype(np.float64)
    work = Work(macs=x.size, bytes=2 * x.nbytes + weight.nbytes, tokens=layer.n_tokens)
    bound = layer_norm_bound(x64, weight.astype(np.float64), EPS)
    return Case(ours, {"numpy": lambda: plain(x), **torch_side(torch)}, (plain(x64),), (bound,), work, look=gathered)


def _norm_case(layer: Layer, act: Callable[[wse.Wafer, PlacedTensor, F32, PlacedTensor], None]) -> Case:
    """A way to normalise tokens, beside its peers."""
    wafer, x, weight = layer.wafer(), layer.x, normal(layer.hidden, seed=1)
    placed, out = put(wafer, x), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))

    def ours() -> Any:
        act(wafer, placed, weight, out)
        return out

    def torch(t: Any, of: Any) -> Call:
        v, w = of(x), of(weight)
        return lambda: t.nn.functional.rms_norm(v, (layer.hidden,), w, EPS)

    x64 = x.astype(np.float64)
    right = x64 / np.sqrt((x64**2).mean(axis=1, keepdims=True) + EPS) * weight
    peers = {"numpy": lambda: x * (1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(EPS))) * weight, **torch_side(torch)}
    work = Work(macs=x.size, bytes=2 * x.nbytes + weight.nbytes, tokens=layer.n_tokens)
    return Case(ours, peers, (right,), (rms_norm_bound(right),), work, look=gathered)


@both("stream_vector")
def _stream_vector(layer: Layer) -> Case:
    wafer, weight, split = layer.wafer(), normal(layer.hidden), Split.balanced(layer.hidden, layer.cols)

    def ours() -> Any:
        with stream_vector(wafer, "norm", weight, split, layer.bands) as tensor:
            return tensor.flat

    peers = {"numpy": weight.copy, **torch_side(lambda t, of: of(weight).clone)}
    return Case(ours, peers, (weight,), (0,), Work(bytes=2 * weight.nbytes))


@both("add_residual")
def _add_residual(layer: Layer) -> Case:
    wafer, x, y = layer.wafer(), layer.x, normal(layer.n_tokens, layer.hidden, seed=1)
    placed, other = put(wafer, x), put(wafer, y, name="y")

    def ours() -> Any:
        add_residual(wafer, placed, other)
        return placed

    peers = {"numpy": lambda: x + y, **torch_call(lambda t, a, b: a + b, x, y)}
    right = x.astype(np.float64) + y
    return Case(ours, peers, (right,), (relative(right, 1),), Work(bytes=3 * x.nbytes, tokens=layer.n_tokens), look=gathered)


def _unary(layer: Layer, run: Callable[[Any, Any], None], formula: Callable[[Any], Any], torch: Any, roundings: float) -> Case:
    """An operation on every element, in place: each call begins with the same values, as the peers' do."""
    wafer, x = layer.wafer(), layer.x
    placed = put(wafer, x)
    before = placed.flat.copy()

    def ours() -> Any:
        placed.flat[...] = before
        run(wafer, placed)
        return placed

    right = formula(x.astype(np.float64))
    bound = relative(np.abs(right) + 1, roundings)
    peers = {"numpy": lambda: formula(x), **torch_call(torch, x)}
    return Case(ours, peers, (right,), (bound,), Work(bytes=2 * x.nbytes, tokens=layer.n_tokens), look=gathered)


@both("bias")
def _bias(layer: Layer) -> Case:
    values = normal(layer.hidden, seed=1)

    def run(wafer: Any, placed: Any) -> None:
        bias(wafer, placed, "bias", values, layer.bands)

    return _unary(layer, run, lambda x: x + values, lambda t, x: x + t.from_numpy(values), 4)


@both("clip")
def _clip(layer: Layer) -> Case:
    def run(wafer: Any, placed: Any) -> None:
        clip(wafer, placed, 0.5)

    return _unary(layer, run, lambda x: np.clip(x, -0.5, 0.5), lambda t, x: x.clamp(-0.5, 0.5), 0)


@both("cap")
def _cap(layer: Layer) -> Case:
    def run(wafer: Any, placed: Any) -> None:
        cap(wafer, placed, 0.5)

    return _unary(layer, run, lambda x: x.dtype.type(0.5) * np.tanh(x / x.dtype.type(0.5)), lambda t, x: 0.5 * t.tanh(x / 0.5), 8)


# ---- products


@both("gate_rows")
def _gate_rows(layer: Layer) -> Case:
    wafer, x, y = layer.wafer(), layer.x, normal(layer.n_tokens, layer.hidden, seed=2)
    w = normal(layer.hidden, 1, seed=1, scale=layer.hidden**-0.5)
    placed, other, gate = put(wafer, x), put(wafer, y, name="y"), streamed(w)
    before = other.flat.copy()

    def ours() -> Any:
        other.flat[...] = before
        gate_rows(wafer, placed, gate, other, layer.bands)
        return other

    right = y / (1 + np.exp(-(x.astype(np.float64) @ w)))
    peers = {"numpy": lambda: y / (1 + np.exp(-(x @ w))), **torch_call(lambda t, a, b, g: b * t.sigmoid(a @ g), x, y, w)}
    work = Work(macs=x.size, bytes=3 * x.nbytes, tokens=layer.n_tokens)
    return Case(ours, peers, (right,), (composed(right),), work, look=gathered)


@both("matmul")
def _matmul(layer: Layer) -> Case:
    wafer, x, n_out = layer.wafer(), layer.x, layer.heads.qkv.total
    w = normal(layer.hidden, n_out, seed=1, scale=layer.hidden**-0.5)
    placed, out, weight = put(wafer, x), room(wafer, layer.n_tokens, layer.heads.qkv), streamed(w)

    def ours() -> Any:
        matmul(wafer, placed, weight, out, layer.bands)
        all_gather_bands(wafer, out, layer.bands)
        return out

    peers = {"numpy": lambda: x @ w, **torch_call(lambda t, a, b: a @ b, x, w)}
    work = Work(macs=layer.n_tokens * w.size, bytes=x.nbytes + w.nbytes + 4 * layer.n_tokens * n_out, tokens=layer.n_tokens)
    return Case(ours, peers, (x.astype(np.float64) @ w,), (linear_bound(x, w.T),), work, look=gathered)


@both("weight_gradient")
def _weight_gradient(layer: Layer) -> Case:
    """Gradient of the weights of a product; the peers' is one product."""
    wafer, x, n_out = layer.wafer(), layer.x, layer.heads.qkv.total
    dy = normal(layer.n_tokens, n_out, seed=1)
    placed, placed_dy = put(wafer, x), room(wafer, layer.n_tokens, layer.heads.qkv)
    wafer.inject(placed_dy, dy)

    def ours() -> Any:
        return weight_gradient(wafer, placed, placed_dy, layer.bands, "gradient")

    peers = {"numpy": lambda: x.T @ dy, **torch_call(lambda t, a, b: a.T @ b, x, dy)}
    work = Work(macs=x.size * n_out, bytes=x.nbytes + dy.nbytes + 4 * x.shape[1] * n_out, tokens=layer.n_tokens)
    return Case(ours, peers, (x.astype(np.float64).T @ dy,), (linear_bound(x.T, dy.T),), work)


@both("matmul_by_kind")
def _matmul_by_kind(layer: Layer) -> Case:
    """Four tokens in five with one matrix, the fifth with another; the peers compute two products of gathered rows."""
    wafer, x, n_out = layer.wafer(), layer.x, layer.heads.qkv.total
    weights = [normal(layer.hidden, n_out, seed=seed, scale=layer.hidden**-0.5) for seed in (1, 2)]
    placed, out = put(wafer, x), room(wafer, layer.n_tokens, layer.heads.qkv)
    fifth = np.arange(layer.n_tokens) % 5 == 4
    rows = [np.flatnonzero(~fifth), np.flatnonzero(fifth)]
    parts = [(streamed(w), Selection.of_tokens(r, layer.bands.split)) for w, r in zip(weights, rows, strict=True) if r.size]
    right, bound = np.empty((layer.n_tokens, n_out)), np.empty((layer.n_tokens, n_out))
    for w, r in zip(weights, rows, strict=True):
        right[r], bound[r] = x[r].astype(np.float64) @ w, linear_bound(x[r], w.T)

    def ours() -> Any:
        matmul_by_kind(wafer, placed, parts, out, layer.bands)
        all_gather_bands(wafer, out, layer.bands)
        return out

    def peer() -> F32:
        y = np.empty((layer.n_tokens, n_out), np.float32)
        for w, r in zip(weights, rows, strict=True):
            y[r] = x[r] @ w
        return y

    n_bytes = x.nbytes + len(parts) * weights[0].nbytes + 4 * layer.n_tokens * n_out
    work = Work(macs=layer.n_tokens * weights[0].size, bytes=n_bytes, tokens=layer.n_tokens)
    return Case(ours, {"numpy": peer}, (right,), (bound,), work, look=gathered)


@both("head_products")
def _head_products(layer: Layer) -> Case:
    """Every head's queries times a matrix of its own, as latent attention folds keys into queries."""
    wafer, heads, n_in, n_out = layer.wafer(), layer.n_kv * layer.q, layer.head_dim, 4 * layer.head_dim
    units, to = (Split.balanced(n // 2, layer.cols) for n in (n_in, n_out))
    x, w = normal(layer.n_tokens, heads, n_in), normal(heads, n_in, n_out, seed=1, scale=n_in**-0.5)
    in_pairs = np.ascontiguousarray(x.reshape(len(x), heads, -1, 2).transpose(0, 2, 1, 3)).reshape(len(x), -1)
    placed, out = put(wafer, in_pairs, units.scaled(2 * heads)), room(wafer, layer.n_tokens, to.scaled(2 * heads))
    tiles = np.concatenate([streamed(of).values for of in w])
    tiles.flags.writeable = False
    weights = StreamedHeads("w", heads, n_in, n_out, tiles)

    def ours() -> Any:
        head_products(wafer, placed, units, weights, out, to, heads, layer.bands)
        return out

    def look(found: Any) -> F32:
        return gathered(found).reshape(len(x), -1, heads, 2).transpose(0, 2, 1, 3).reshape(len(x), heads, n_out)

    peers = {
        "numpy": lambda: np.matmul(x.swapaxes(0, 1), w).swapaxes(0, 1),
        **torch_call(lambda t, a, b: t.einsum("thi,hio->tho", a, b), x, w),
    }
    right = np.einsum("thi,hio->tho", x.astype(np.float64), w)
    bound = np.stack([linear_bound(x[:, head], w[head].T) for head in range(heads)], axis=1)
    work = Work(macs=layer.n_tokens * w.size, bytes=x.nbytes + w.nbytes + 4 * right.size, tokens=layer.n_tokens)
    return Case(ours, peers, (right,), (bound,), work, look=look)


@both("logits")
def _logits(layer: Layer) -> Case:
    wafer, x = layer.wafer(), layer.x
    w = normal(layer.hidden, layer.vocab, seed=1, scale=layer.hidden**-0.5)
    placed, head, wanted = put(wafer, x), streamed(w), Selection.of_tokens(np.arange(layer.n_tokens), layer.bands.split)
    peers = {"numpy": lambda: x @ w, **torch_call(lambda t, a, b: a @ b, x, w)}
    work = Work(macs=layer.n_tokens * w.size, bytes=x.nbytes + w.nbytes + 4 * layer.n_tokens * layer.vocab, tokens=layer.n_tokens)
    bound = linear_bound(x, w.T)
    return Case(lambda: logits(wafer, placed, head, wanted, layer.bands), peers, (x.astype(np.float64) @ w,), (bound,), work)


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


@both("dense_ffn")
def _dense_ffn(layer: Layer) -> Case:
    wafer, x, width = layer.wafer(), layer.x, layer.ffn * layer.top_k
    gate, up = (normal(layer.hidden, width, seed=s, scale=layer.hidden**-0.5) for s in (1, 2))
    down = normal(width, layer.hidden, seed=3, scale=width**-0.5)
    weights = FfnWeights(streamed(alternate(gate, up)), streamed(down))
    placed, out = put(wafer, x), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))

    def ours() -> Any:
        dense_ffn(wafer, placed, weights, out, layer.bands)
        return out

    def torch(t: Any, of: Any) -> Call:
        v, g, u, d = of(x), of(gate), of(up), of(down)
        return lambda: (t.nn.functional.silu(v @ g) * (v @ u)) @ d

    x64 = x.astype(np.float64)
    right = (_silu(x64 @ gate) * (x64 @ up)) @ down
    peers = {"numpy": lambda: (_silu(x @ gate) * (x @ up)) @ down, **torch_side(torch)}
    n_weights = gate.size + up.size + down.size
    work = Work(macs=layer.n_tokens * n_weights, bytes=4 * n_weights + 2 * x.nbytes, tokens=layer.n_tokens)
    return Case(ours, peers, (right,), (composed(right),), work, look=gathered)


def _backward(x: Any, d: Any, gate: Any, up: Any, down: Any) -> tuple[Any, Any, Any, Any]:
    """Gradients of input, alternating gate and up, and down of ``(silu(x @ gate) * (x @ up)) @ down``; and of a factor of each output."""
    g, u = x @ gate, x @ up
    s, dh = 1 / (1 + np.exp(-g)), d @ down.T
    h = g * s * u
    dg, du = dh * u * s * (1 + g * (1 - s)), dh * g * s
    return dg @ gate.T + du @ up.T, alternate(x.T @ dg, x.T @ du), h.T @ d, (h * dh).sum(axis=1)


def _streamed_back(gate: F32, up: F32, down: F32) -> BackwardWeights:
    gate_up = alternate(gate, up)
    return BackwardWeights(streamed(gate_up), *(streamed(np.ascontiguousarray(w.T)) for w in (down, gate_up)))


@both("dense_ffn_backward")
def _dense_ffn_backward(layer: Layer) -> Case:
    wafer, x, width = layer.wafer(), layer.x, layer.ffn * layer.top_k
    gate, up = (normal(layer.hidden, width, seed=s, scale=layer.hidden**-0.5) for s in (1, 2))
    down, d = normal(width, layer.hidden, seed=3, scale=width**-0.5), normal(*x.shape, seed=5)
    weights = _streamed_back(gate, up, down)
    placed, placed_d, dx = put(wafer, x), put(wafer, d), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))

    def ours() -> Any:
        # Slabs of the transposed projection have twice the rows: with pieces of 32 columns they would not fit.
        found = dense_ffn_backward(wafer, placed, weights, placed_d, dx, layer.bands, "layer", chunk=16)
        return dx, found

    def look(result: Any) -> Any:
        return gathered(result[0]), result[1].gate_up, result[1].down

    right = _backward(*(a.astype(np.float64) for a in (x, d, gate, up, down)))[:3]
    n_weights = gate.size + up.size + down.size
    work = Work(macs=(3 * n_weights - down.size) * layer.n_tokens, bytes=4 * (3 * n_weights - down.size), tokens=layer.n_tokens)
    peers = {"numpy": lambda: _backward(x, d, gate, up, down)[:3]}
    return Case(ours, peers, right, tuple(composed(r) for r in right), work, look=look)


# ---- routing and experts


def _gate(layer: Layer) -> F32:
    return normal(layer.hidden, layer.n_experts, seed=4, scale=layer.hidden**-0.5)


def _route_by_formula(scores: Any, k: int) -> tuple[Any, Any]:
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(p, ids, axis=1)
    return ids, chosen / chosen.sum(axis=1, keepdims=True)


@both("route and report_chosen")
def _route(layer: Layer) -> Case:
    wafer, x, w, k = layer.wafer(), layer.x, _gate(layer), layer.top_k
    placed, gate = put(wafer, x), RouterWeights(streamed(w))

    def ours() -> Any:
        with route(wafer, placed, gate, layer.bands, k, MIXTRAL_ROUTING) as routing:
            chosen = report_chosen(wafer, routing, layer.bands, layer.n_experts)
            return routing.topk_ids, routing.topk_weights, chosen

    def numpy() -> Any:
        ids, weights = _route_by_formula(x @ w, k)
        return ids, weights, np.unique(ids)

    def torch(t: Any, of: Any) -> Call:
        a, b = of(x), of(w)

        def call() -> Any:
            weights, ids = t.topk(t.softmax(a @ b, 1), k, dim=1)
            return ids, weights / weights.sum(1, keepdim=True), t.unique(ids)

        return call

    ids, weights = _route_by_formula(x.astype(np.float64) @ w, k)
    work = Work(macs=layer.n_tokens * w.size, bytes=x.nbytes + w.nbytes, tokens=layer.n_tokens)
    peers = {"numpy": numpy, **torch_side(torch)}
    return Case(ours, peers, (ids, weights, np.unique(ids)), (0, composed(weights), 0), work)


@both("move_tokens")
def _move_tokens(layer: Layer) -> Case:
    """A tile of a quarter of the tokens, from its rows to all rows."""
    wafer, x = layer.wafer(), layer.x
    n = -(-layer.n_tokens // 4)
    placed, part = put(wafer, x), TokenBands(n, layer.rows)
    place = wafer.placement((n, layer.hidden), ("row", part.split), ("col", Split.balanced(layer.hidden, layer.cols)))
    own = wafer.empty("tile", place)

    def ours() -> Any:
        move_tokens(wafer, placed, layer.bands, 0, own, part, 0, n)
        return own

    peers = {"numpy": lambda: x[:n].copy(), **torch_call(lambda _, v: v.clone(), x[:n])}
    return Case(ours, peers, (x[:n],), (0,), Work(bytes=2 * x[:n].nbytes, tokens=n), look=gathered)


@both("assign")
def _assign(layer: Layer) -> Case:
    wafer, numbers, k = layer.wafer(), np.arange(layer.n_tokens) * 5, layer.top_k
    rule = RoutingRule(routing_algorithm="uniform")

    def ours() -> Any:
        with assign(wafer, numbers, layer.bands, layer.n_experts, k, rule) as routing:
            return routing.topk_ids

    def numpy() -> Any:
        return (numbers[:, None] + np.arange(k)) % layer.n_experts

    return Case(ours, {"numpy": numpy}, (numpy(),), (0,), Work(tokens=layer.n_tokens))


@both("experts_ffn_backward")
def _experts_ffn_backward(layer: Layer) -> Case:
    """Gradients of the input and of the experts' weights, beside those of all matrices, which are drained."""
    wafer, x, k = layer.wafer(), layer.x, layer.top_k
    ids, factors = _route_by_formula(x @ _gate(layer), k)
    chosen, d = np.unique(ids).tolist(), normal(*x.shape, seed=5)
    nets = {
        e: (
            *(normal(layer.hidden, layer.ffn, seed=s + e, scale=layer.hidden**-0.5) for s in (100, 200)),
            normal(layer.ffn, layer.hidden, seed=300 + e, scale=layer.ffn**-0.5),
        )
        for e in chosen
    }
    experts = [(e, _streamed_back(*net)) for e, net in nets.items()]
    placed, placed_d, dx = put(wafer, x), put(wafer, d), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))
    d_share = room(wafer, layer.n_tokens, Split.single(k, 0, layer.cols))
    routing = route(wafer, placed, RouterWeights(streamed(_gate(layer))), layer.bands, k, MIXTRAL_ROUTING)

    def ours() -> Any:
        sizes = {"n_experts": layer.n_experts}
        experts_ffn_backward(wafer, placed, routing, experts, layer.ffn, placed_d, dx, d_share, layer.bands, "layer", **sizes)
        return dx, d_share

    def by_formula(v: Any, grad: Any, weights: Any) -> Any:
        out, share = np.zeros_like(v), np.zeros(weights.shape, v.dtype)
        for e in chosen:
            token, slot = np.nonzero(ids == e)
            w = weights[token, slot][:, None]
            of_net = _backward(v[token], w * grad[token], *(m.astype(v.dtype) for m in nets[e]))
            out[token] += of_net[0]
            share[token, slot] = of_net[3] / w[:, 0]
        return out, share

    right = by_formula(x.astype(np.float64), d.astype(np.float64), factors.astype(np.float64))
    size = sum(m.size for m in nets[chosen[0]])
    work = Work(macs=8 * size // 3 * layer.n_tokens * k, bytes=4 * 8 * size // 3 * len(chosen), tokens=layer.n_tokens)
    peers = {"numpy": lambda: by_formula(x, d, factors)}
    bounds = tuple(2 * composed(r) for r in right)
    return Case(ours, peers, right, bounds, work, look=lambda both: tuple(gathered(one) for one in both))


@both("router_backward")
def _router_backward(layer: Layer) -> Case:
    """Gradients of the gate and, added to nothing, of the input."""
    wafer, x, k, gate = layer.wafer(), layer.x, layer.top_k, _gate(layer)
    ids, d = _route_by_formula(x @ gate, k)[0], normal(layer.n_tokens, k, seed=5)
    placed, dx = put(wafer, x), put(wafer, np.zeros_like(x))
    d_share = put(wafer, d, share_split(k, layer.cols))
    routing = route(wafer, placed, RouterWeights(streamed(gate)), layer.bands, k, MIXTRAL_ROUTING)
    matrices = RouterMatrices(streamed(gate), streamed(np.ascontiguousarray(gate.T)))

    def ours() -> Any:
        return router_backward(wafer, placed, matrices, MIXTRAL_ROUTING, routing, d_share, dx, layer.bands, "router")

    def by_formula(v: Any, grad: Any) -> Any:
        scores = v @ gate
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        chosen = np.take_along_axis(p, ids, axis=1)
        total = chosen.sum(axis=1, keepdims=True)
        wide = np.zeros_like(p)
        np.put_along_axis(wide, ids, (grad - (chosen / total * grad).sum(axis=1, keepdims=True)) / total, axis=1)
        return v.T @ (p * (wide - (p * wide).sum(axis=1, keepdims=True)))

    right = by_formula(x.astype(np.float64), d.astype(np.float64))
    work = Work(macs=3 * x.size * layer.n_experts, bytes=2 * x.nbytes + 12 * gate.size, tokens=layer.n_tokens)
    return Case(ours, {"numpy": lambda: by_formula(x, d)}, (right,), (2e-5 * float(np.abs(d).max() + np.std(right)),), work)


@both("experts_ffn")
def _experts_ffn(layer: Layer) -> Case:
    wafer, x, k = layer.wafer(), layer.x, layer.top_k
    ids, factors = _route_by_formula(x @ _gate(layer), k)
    chosen = np.unique(ids).tolist()
    gates, ups = ({e: normal(layer.hidden, layer.ffn, seed=s + e, scale=layer.hidden**-0.5) for e in chosen} for s in (100, 200))
    downs = {e: normal(layer.ffn, layer.hidden, seed=300 + e, scale=layer.ffn**-0.5) for e in chosen}
    experts = [(e, FfnWeights(streamed(alternate(gates[e], ups[e])), streamed(downs[e]))) for e in chosen]
    placed, out = put(wafer, x), room(wafer, layer.n_tokens, Split.balanced(layer.hidden, layer.cols))
    routing = route(wafer, placed, RouterWeights(streamed(_gate(layer))), layer.bands, k, MIXTRAL_ROUTING)

    def ours() -> Any:
        experts_ffn(wafer, placed, routing, [experts], layer.ffn, out, layer.bands, n_experts=layer.n_experts)
        return out

    def by_formula(v: Any, weights: Any) -> Any:
        result = np.zeros_like(v)
        for e in chosen:
            token, slot = np.nonzero(ids == e)
            some = v[token]
            y = (_silu(some @ gates[e]) * (some @ ups[e])) @ downs[e]
            result[token] += weights[token, slot][:, None] * y
        return result

    def torch(t: Any, of: Any) -> Call:
        v, i, weights = of(x), of(ids), of(factors)
        matrices = {e: (of(gates[e]), of(ups[e]), of(downs[e])) for e in chosen}

        def call() -> Any:
            result = t.zeros_like(v)
            for e in chosen:
                token, slot = t.nonzero(i == e, as_tuple=True)
                g, u, d = matrices[e]
                some = v[token]
                y = (t.nn.functional.silu(some @ g) * (some @ u)) @ d
                result.index_add_(0, token, weights[token, slot][:, None] * y)
            return result

        return call

    right = by_formula(x.astype(np.float64), factors.astype(np.float64))
    of_expert = 3 * layer.hidden * layer.ffn
    work = Work(macs=ids.size * of_expert, bytes=4 * len(chosen) * of_expert + 2 * x.nbytes, tokens=layer.n_tokens)
    peers = {"numpy": lambda: by_formula(x, factors), **torch_side(torch)}
    return Case(ours, peers, (right,), (composed(right),), work, look=gathered)


# ---- attention


def _norm_weights(layer: Layer) -> tuple[F32, F32]:
    """Of queries and of keys, (head_dim,), in published order."""
    return normal(layer.head_dim, seed=5), normal(layer.head_dim, seed=6)


def _in_units(layer: Layer, weight: F32) -> F32:
    """A head's elements in the order of its pair units."""
    return weight.reshape(2, layer.half).T.reshape(-1)


def _head_normed(layer: Layer, rows: Any) -> tuple[Any, Any]:
    """Queries and keys (T, heads, d), normalised."""
    q, k, _ = layer.published(rows)
    w_q, w_k = _norm_weights(layer)
    eps = rows.dtype.type(EPS)
    return tuple(v * (1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + eps)) * w for v, w in ((q, w_q), (k, w_k)))


def _head_norm_peers(layer: Layer) -> tuple[dict[str, Call], tuple[Any, Any]]:
    new = layer.qkv[layer.n_cached :]
    q, k, _ = layer.published(new)
    w_q, w_k = _norm_weights(layer)
    eps = np.float32(EPS)

    def numpy() -> Any:
        return tuple(v * (1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + eps)) * w for v, w in ((q, w_q), (k, w_k)))

    def torch(t: Any, of: Any) -> Call:
        pairs = [(of(v), of(w)) for v, w in ((q, w_q), (k, w_k))]
        return lambda: tuple(t.nn.functional.rms_norm(v, (layer.head_dim,), w, EPS) for v, w in pairs)

    return {"numpy": numpy, **torch_side(torch)}, _head_normed(layer, new.astype(np.float64))


def _head_norm_work(layer: Layer) -> Work:
    n = layer.n_tokens * layer.n_kv * (layer.q + 1) * layer.head_dim
    return Work(macs=n, bytes=8 * n, tokens=layer.n_tokens)


@both("head_norm")
def _head_norm(layer: Layer) -> Case:
    wafer, new = layer.wafer(), layer.qkv[layer.n_cached :]
    placed = put(wafer, new, layer.heads.qkv)
    before = placed.flat.copy()
    w_q, w_k = (_in_units(layer, w) for w in _norm_weights(layer))
    peers, right = _head_norm_peers(layer)

    def ours() -> Any:
        placed.flat[...] = before  # as the peers do, from the same values each time
        head_norm(wafer, placed, layer.heads, ("q_norm", "k_norm"), (w_q, w_k), EPS, layer.bands)
        return placed

    return Case(
        ours, peers, right, tuple(rms_norm_bound(v) for v in right), _head_norm_work(layer),
        look=lambda found: layer.published(gathered(found))[:2],
    )  # fmt: skip


@both("qk_norm")
def _qk_norm(layer: Layer) -> Case:
    wafer, new, heads = layer.wafer(), layer.qkv[layer.n_cached :], layer.heads
    placed = put(wafer, new, heads.qkv)
    before, n = placed.flat.copy(), layer.n_tokens
    q, k, _ = layer.published(new)
    w_q, w_k = (1 + normal(v[0].size, seed=i) / 4 for i, v in enumerate((q, k), 7))

    def ours() -> Any:
        placed.flat[...] = before
        qk_norm(wafer, placed, heads, ("q_norm", "k_norm"), (_row_in_units(layer, w_q), _row_in_units(layer, w_k)), EPS, layer.bands)
        return placed

    def by_formula(*pair: Any) -> Any:
        flat = [v.reshape(n, -1) for v in pair]
        eps = flat[0].dtype.type(EPS)
        return tuple(
            (v * (1 / np.sqrt((v * v).mean(axis=1, keepdims=True) + eps)) * w).reshape(p.shape)
            for v, w, p in zip(flat, (w_q, w_k), pair, strict=True)
        )

    def torch(t: Any, of: Any) -> Call:
        pairs = [(of(v.reshape(n, -1)), of(w), v.shape) for v, w in ((q, w_q), (k, w_k))]
        return lambda: tuple(t.nn.functional.rms_norm(v, (w.numel(),), w, EPS).reshape(shape) for v, w, shape in pairs)

    right = by_formula(q.astype(np.float64), k.astype(np.float64))
    bounds = tuple(rms_norm_bound(v.reshape(n, -1)).reshape(v.shape) for v in right)
    peers = {"numpy": lambda: by_formula(q, k), **torch_side(torch)}
    return Case(ours, peers, right, bounds, _head_norm_work(layer), look=lambda found: layer.published(gathered(found))[:2])


def _row_in_units(layer: Layer, weight: F32) -> F32:
    """A weight over all heads, (heads * d,), in the order of the wafer layout: pair unit, head of the group, element."""
    half, per_group = layer.head_dim // 2, weight.size // layer.head_dim // layer.n_kv
    return np.ascontiguousarray(weight.reshape(layer.n_kv, per_group, 2, half).transpose(0, 3, 1, 2)).reshape(-1)


@both("mesh_head_norm")
def _mesh_head_norm(layer: Layer) -> Case:
    placed = put(layer.wafer(), layer.qkv[layer.n_cached :], layer.heads.qkv)
    before, flat = placed.flat.copy(), placed.flat
    w_q, w_k = (_in_units(layer, w) for w in _norm_weights(layer))
    starts, size = layer.heads.units.offsets, np.float32(layer.head_dim)
    peers, right = _head_norm_peers(layer)

    def ours() -> Any:
        flat[...] = before
        mesh_head_norm(flat, layer.n_tokens, starts, layer.q, layer.half, w_q, w_k, size, np.float32(EPS))
        return placed

    return Case(
        ours, peers, right, tuple(rms_norm_bound(v) for v in right), _head_norm_work(layer),
        look=lambda found: layer.published(gathered(found))[:2],
    )  # fmt: skip


def _spec(layer: Layer) -> ModelSpec:
    return ModelSpec(
        family="llama", vocab_size=layer.vocab, hidden_size=layer.hidden, intermediate_size=layer.ffn, num_layers=1,
        num_heads=layer.n_kv * layer.q, num_kv_heads=layer.n_kv, head_dim=layer.head_dim, rms_norm_eps=EPS, rope_theta=1e4,
        max_position_embeddings=4096,
    )  # fmt: skip


def _angles(layer: Layer) -> Any:
    """Of every new token and rotary pair, (T, half)."""
    positions = np.arange(layer.n_cached, layer.n_cached + layer.n_tokens)
    return np.outer(positions, 1e4 ** -(np.arange(layer.half) / layer.half))


@both("place_rotary")
def _place_rotary(layer: Layer) -> Case:
    wafer, spec, (_, sequences) = layer.wafer(), _spec(layer), layer.cache_with(layer.wafer())

    def ours() -> Any:
        cos, sin = place_rotary(wafer, spec, sequences, layer.heads, layer.bands)
        with cos, sin:
            return gathered(cos), gathered(sin)

    def numpy() -> Any:
        angle = _angles(layer)
        return tuple(np.tile(f(angle).astype(np.float32), (1, layer.n_kv)) for f in (np.cos, np.sin))

    def torch(t: Any, of: Any) -> Call:
        positions = t.arange(layer.n_cached, layer.n_cached + layer.n_tokens, dtype=t.float64)
        pairs = t.arange(layer.half, dtype=t.float64)

        def call() -> Any:
            angle = t.outer(positions, 1e4 ** -(pairs / layer.half))
            return tuple(f(angle).float().repeat(1, layer.n_kv) for f in (t.cos, t.sin))

        return call

    right = tuple(np.tile(f(_angles(layer)), (1, layer.n_kv)) for f in (np.cos, np.sin))
    work = Work(bytes=4 * 2 * right[0].size, tokens=layer.n_tokens)
    # Half an ulp of the table, and what an ulp of the frequency turns the last position by.
    return Case(ours, {"numpy": numpy, **torch_side(torch)}, right, (U, U), work)


@both("place_factors")
def _place_factors(layer: Layer) -> Case:
    wafer = layer.wafer()
    values = (1 + np.arange(layer.n_tokens, dtype=np.float32) / layer.n_tokens)[:, None]

    def ours() -> Any:
        with place_factors(wafer, layer.heads, layer.bands, values) as factors:
            last = int(layer.heads.units.used[-1])
            return np.concatenate([factors.block(row, last) for row in layer.bands.split.representatives.tolist()])

    peers = {"numpy": values.copy, **torch_call(lambda t, v: v.clone(), values)}
    return Case(ours, peers, (values.astype(np.float64),), (0.0,), Work(bytes=values.nbytes, tokens=layer.n_tokens))


@both("rotate (launch)")
def _rotate(layer: Layer) -> Case:
    wafer, (_, sequences) = layer.wafer(), layer.cache_with(layer.wafer())
    new = layer.qkv[layer.n_cached :]
    placed = put(wafer, new, layer.heads.qkv)
    before = placed.flat.copy()
    cos, sin = place_rotary(wafer, _spec(layer), sequences, layer.heads, layer.bands)
    q, k, _ = layer.published(new)

    def ours() -> Any:
        placed.flat[...] = before
        wafer.launch(ROTATE_QK, qkv=placed, cos=cos, sin=sin, q_slots=layer.q)
        return placed

    def turned(v: Any, co: Any, si: Any, join: Any) -> Any:
        a, b = v[..., : layer.half], v[..., layer.half :]
        return join((a * co - b * si, b * co + a * si), -1)

    tables = [np.cos(_angles(layer))[:, None], np.sin(_angles(layer))[:, None]]
    narrow = [table.astype(np.float32) for table in tables]

    def torch(t: Any, of: Any) -> Call:
        co, si = map(of, narrow)
        a, b = of(q), of(k)
        return lambda: tuple(turned(v, co, si, t.cat) for v in (a, b))

    peers = {"numpy": lambda: tuple(turned(v, *narrow, np.concatenate) for v in (q, k)), **torch_side(torch)}
    right = tuple(turned(v.astype(np.float64), *tables, np.concatenate) for v in (q, k))
    n = q.size + k.size
    work = Work(macs=n, bytes=8 * n, tokens=layer.n_tokens)
    bounds = tuple(6 * U * float(np.abs(v).max()) for v in (q, k))
    return Case(ours, peers, right, bounds, work, look=lambda found: layer.published(gathered(found))[:2])


def _append_case(layer: Layer, append: Callable[[Any, Any, Any, Any], None]) -> Case:
    """Keys and values of the new tokens put behind those that are there."""
    wafer = layer.wafer()
    cache, sequences = layer.cache_with(wafer)
    new = layer.qkv[layer.n_cached :]
    placed = put(wafer, new, layer.heads.qkv)
    _, k, v = layer.published(new)
    _, k_old, v_old = layer.published(layer.qkv[: layer.n_cached])
    n_all, stores = layer.n_cached + layer.n_tokens, []
    for old in (k_old, v_old):
        whole = np.empty((n_all, layer.n_kv, layer.head_dim), np.float32)
        whole[: layer.n_cached] = old
        stores.append(whole)

    def ours() -> Any:
        append(wafer, cache, placed, sequences)
        return cache.buffers(0, sequences)[:2]

    def read(found: Any) -> Any:
        units, out = layer.heads.units, []
        for flat in found:
            panels = [flat[n_all * 2 * a : n_all * 2 * b].reshape(n_all, -1) for a, b in zip(units.starts, units.stops, strict=True)]
            pairs = np.hstack(panels).reshape(n_all, layer.n_kv, layer.half, 2)
            out.append(pairs.transpose(0, 1, 3, 2).reshape(n_all, layer.n_kv, layer.head_dim))
        return tuple(out)

    def numpy() -> Any:
        for store, values in zip(stores, (k, v), strict=True):
            store[layer.n_cached :] = values
        return tuple(stores)

    def torch(t: Any, of: Any) -> Call:
        pairs = [(of(store.copy()), of(values)) for store, values in zip(stores, (k, v), strict=True)]

        def call() -> Any:
            for store, values in pairs:
                store[layer.n_cached :] = values
            return tuple(store for store, _ in pairs)

        return call

    _, all_k, all_v = layer.published(layer.qkv)
    work = Work(bytes=2 * (k.nbytes + v.nbytes), tokens=layer.n_tokens)
    return Case(ours, {"numpy": numpy, **torch_side(torch)}, (all_k, all_v), (0, 0), work, look=read)


@both("KVCache.append")
def _append(layer: Layer) -> Case:
    return _append_case(layer, lambda wafer, cache, placed, sequences: cache.append(0, placed, sequences, layer.bands))


@both("mesh_store_kv")
def _mesh_store_kv(layer: Layer) -> Case:
    def store(wafer: Any, cache: Any, placed: Any, sequences: Any) -> None:
        k, v, base, cap = cache.buffers(0, sequences)
        starts, new = layer.heads.units.offsets, sequences
        mesh_store_kv(placed.flat, starts, layer.q, new.first_token, new.n_new, new.start, base, cap, k, v)

    return _append_case(layer, store)


def _attention_case(layer: Layer, attend: Callable[[Any, Any, Any, Any, Any], None]) -> Case:
    wafer = layer.wafer()
    cache, sequences = layer.cache_with(wafer)
    placed = put(wafer, layer.qkv[layer.n_cached :], layer.heads.qkv)
    cache.append(0, placed, sequences, layer.bands)
    context = room(wafer, layer.n_tokens, layer.heads.context)
    queries, _, _ = layer.published(layer.qkv[layer.n_cached :])
    _, keys, values = layer.published(layer.qkv)
    # Heads first, as attention is written everywhere: queries (heads, T, d), keys and values (kv heads, keys, d).
    q, k, v = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (queries, keys, values))
    n_keys = layer.n_cached + layer.n_tokens
    seen = np.arange(n_keys) <= np.arange(layer.n_cached, n_keys)[:, None]

    def ours() -> Any:
        attend(wafer, cache, placed, context, sequences)
        return context

    def by_formula(q: Any, k: Any, v: Any) -> Any:
        k, v = np.repeat(k, layer.q, axis=0), np.repeat(v, layer.q, axis=0)
        scores = np.where(seen, q @ k.swapaxes(1, 2) * q.dtype.type(layer.head_dim**-0.5), q.dtype.type(-np.inf))
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (p @ v) / p.sum(axis=-1, keepdims=True)

    def torch(t: Any, of: Any) -> Call:
        a, b, c = (of(x)[None] for x in (q, k, v))
        causal = layer.n_tokens > 1
        return lambda: t.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=True)[0]

    right = by_formula(*(x.astype(np.float64) for x in (q, k, v)))
    work = Work(
        macs=2 * int(seen.sum()) * layer.n_kv * layer.q * layer.head_dim, bytes=2 * q.nbytes + k.nbytes + v.nbytes, tokens=layer.n_tokens
    )
    return Case(
        ours, {"numpy": lambda: by_formula(q, k, v), **torch_side(torch)}, (right,), (composed(right),), work,
        look=lambda found: layer.context_heads(gathered(found)).swapaxes(0, 1),
    )  # fmt: skip


@both("attention")
def _attention(layer: Layer) -> Case:
    def attend(wafer: Any, cache: Any, placed: Any, context: Any, sequences: Any) -> None:
        attention(wafer, placed, context, cache, 0, sequences, layer.bands)

    return _attention_case(layer, attend)


def _index_case(layer: Layer, choose: Any) -> Case:
    """Keys that `choose` takes for the new tokens, beside a stable sort of NumPy's scores."""
    wafer, n_heads, n, past = layer.wafer(), layer.q, layer.n_tokens, layer.n_cached
    indexer = Indexer(num_heads=n_heads, head_dim=layer.head_dim, topk=max(1, (past + n) // 4))
    heads = index_heads(indexer, wafer.cols)
    values = normal(past + n, layer.half, n_heads + 1, 2)
    weights = normal(n, n_heads, seed=1)
    cache = KVCache(wafer, heads, 1, np.array([past + n]))
    flat = values.reshape(past + n, -1)
    for first, count in ((0, past), (past, n)):
        if count:
            part = sequences_of([0], [count], [first])
            with put(wafer, flat[first : first + count], heads.qkv) as placed:
                cache.append(0, placed, part, TokenBands(count, layer.rows))
            if first == 0 and past:
                cache.advance(part)
    new = sequences_of([0], [n], [past])
    placed = put(wafer, flat[past:], heads.qkv)
    of_heads = put(wafer, weights, Split.single(n_heads, weights_column(heads), wafer.cols))
    queries, keys = values[past:, :, :n_heads], values[:, :, n_heads]
    key, position = np.arange(past + n), past + np.arange(n)[:, None]

    def scores(q: Any, k: Any, w: Any) -> Any:
        products = np.maximum(np.einsum("tuhe,sue->ths", q, k) * indexer.score_scale, 0)
        return np.where(key <= position, np.einsum("th,ths->ts", w * indexer.weight_scale, products), -np.inf)

    def highest(of: Any) -> Any:
        taken = np.zeros(of.shape, np.bool_)
        np.put_along_axis(taken, np.argsort(-of, axis=1, kind="stable")[:, : indexer.topk], True, axis=1)
        return taken & (key <= position)

    right = highest(scores(queries.astype(np.float64), keys.astype(np.float64), weights.astype(np.float64)))
    n_pairs = int((key <= position).sum())
    work = Work(macs=n_pairs * n_heads * layer.head_dim, bytes=flat.nbytes, tokens=n)
    # A choice may differ where scores nearly do; here at most one key in a hundred.
    return Case(
        lambda: choose(wafer, placed, of_heads, cache, new, indexer, layer),
        {"numpy": lambda: (highest(scores(queries, keys, weights)) != right).sum(axis=1)},
        (np.zeros(n),), (0.01 * right.sum() + 1,), work, look=lambda taken: (taken != right).sum(axis=1),
    )  # fmt: skip


@both("choose_keys")
def _choose_keys(layer: Layer) -> Case:
    def choose(wafer: Any, qk: Any, weights: Any, cache: Any, new: Any, indexer: Any, layer: Layer) -> Any:
        return choose_keys(wafer, qk, weights, cache, 0, new, layer.bands, indexer, cache.heads.units).taken

    return _index_case(layer, choose)


@both("mesh_index_keys")
def _mesh_index_keys(layer: Layer) -> Case:
    def choose(wafer: Any, qk: Any, weights: Any, cache: Any, new: Any, indexer: Any, layer: Layer) -> Any:
        taken = np.zeros((layer.n_tokens, layer.n_cached + layer.n_tokens), np.bool_)
        k, _, base, cap = cache.buffers(0, new)
        mesh_index_keys(
            qk.flat, cache.heads.units.offsets, indexer.num_heads, weights.flat, np.float32(indexer.score_scale),
            np.float32(indexer.weight_scale), indexer.topk, new.first_token, new.n_new, new.start, base, cap, k, taken,
            np.zeros((0, 0), np.int32),
        )  # fmt: skip
        return taken

    return _index_case(layer, choose)


@both("mesh_attention")
def _mesh_attention(layer: Layer) -> Case:
    return _attention_driver(layer, mesh_attention)


@both("mesh_attention_rounded")
def _mesh_attention_rounded(layer: Layer) -> Case:
    return _attention_driver(layer, lambda *args: mesh_attention_rounded(*args, TO_F16), rounded=True)


def _attention_driver(layer: Layer, driver: Any, *, rounded: bool = False) -> Case:
    none, no_sink = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)

    def attend(wafer: Any, cache: Any, placed: Any, context: Any, new: Any) -> None:
        admitted = FULL.ranges(new.positions)
        k, v, base, cap = cache.buffers(0, new)
        heads = layer.heads
        (groups,) = query_groups(heads, FULL, heads.queries_per_kv)
        driver(
            placed.flat, heads.units.offsets, heads.queries_per_kv, groups.array, heads.head_dim, heads.scale, heads.cap, no_sink,
            admitted.first, admitted.ranges, new.first_token, new.n_new, base, cap, k, v, context.flat, none, none,
        )  # fmt: skip

    case = _attention_case(layer, attend)
    if rounded:  # half a step of float16, 2**-11, of each weight and of each partial sum; here of a value of at most 5
        n_keys = layer.n_cached + layer.n_tokens
        case = replace(case, bounds=(5 * 2.0**-11 * n_keys,))
    return case
