"""Latent attention: queries, latent and rotary key of the new tokens on the way in, the values of all heads on the way out.

Absorbed form. A score is ``q_nope . (latent @ w_uk) + q_rope . k_rope = [q_nope @ w_uk.T, q_rope] . [latent, k_rope]``: every head's
query, taken through the head's ``w_uk``, meets one key that all heads share, and that key is what the cache holds. Attention then is that
of one key/value head whose values are the first elements of its keys, and what it gives for a head is a mixture of latents, which the
head's ``w_uv`` makes its value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from wse_emu.engine.forward_pass import ForwardPass
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.weights import layer_prefix
from wse_emu.layers.head_products import PUT_SLOTS, ROTATE_SLOTS, head_products
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.layers.norm import rms_norm
from wse_emu.memoryx.layout import pairs_to_published
from wse_emu.wafer.placement import Split
from wse_emu.wafer.tensor import PlacedTensor


def latent_queries(
    run: ForwardPass, normal: PlacedTensor, qk: PlacedTensor, also: Callable[[PlacedTensor], None] | None = None
) -> None:
    """Absorbed queries of all heads and the key that they share.

    Parameters
    ----------
    run : ForwardPass
    normal : PlacedTensor, (T, hidden), float32
        Normalised residual stream.
    qk : PlacedTensor, (T, (kv_lora_rank + rope) * (num_heads + 1)), float32
        Written: of every pair unit of the key, latent first, the queries of all heads, then the key.
    also : callable, optional
        Called with what queries are made of, (T, q_lora_rank) or `normal`, while it is there.
    """
    latent = _latent(run)
    with ExitStack() as stack:
        source = normal if latent.q_lora_rank is None else _short_queries(run, normal, latent.q_lora_rank, stack)
        _queries(run, latent, source, qk)
        if also is not None:
            also(source)
    _key(run, latent, normal, qk)


def latent_values(run: ForwardPass, mixed: PlacedTensor, context: PlacedTensor) -> None:
    """``context[head] = mixed[head] @ w_uv[head]``: mixtures of latents, (T, kv_lora_rank * num_heads), to (T, v_head_dim * num_heads)."""
    spec, latent = run.spec, _latent(run)
    with run.scope("values"):
        w_uv = run.weights.heads(layer_prefix(run.current_layer) + "w_uv", latent.kv_lora_rank, latent.v_head_dim)
        units = value_units(run)
        head_products(
            run.wafer, mixed, run.heads.value_units, w_uv, context, units, spec.num_heads, run.bands, chunk=run.options.piece
        )  # fmt: skip
        if run.result.taps is not None:
            values = _published(run, context, spec.num_heads)
            run.result.taps.stages[run.layer, "attn_context"] = values.reshape(len(values), -1)


def value_units(run: ForwardPass) -> Split:
    """Pair units of the heads' values over columns."""
    return Split.balanced(_latent(run).v_head_dim // 2, run.wafer.cols)


def tap_mixed(run: ForwardPass, mixed: PlacedTensor) -> None:
    """Record the mixtures of latents."""
    if run.result.taps is not None:
        run.result.taps.stages[run.layer, "attn_latent"] = _published(run, mixed, run.spec.num_heads)


def _latent(run: ForwardPass) -> LatentAttention:
    assert run.spec.latent is not None
    return run.spec.latent


def _published(run: ForwardPass, x: PlacedTensor, n_slots: int, *, rotary: bool = False) -> NDArray[np.float32]:
    """A tensor of pair units as heads in published order, (T, n_slots, elements)."""
    n = x.placement.shape[1] // n_slots
    pairs = run.spec.rotary.pairs(n) if rotary else np.arange(n).reshape(-1, 2)
    return pairs_to_published(run.wafer.drain(x, kind="probe"), n_slots, pairs)


def place(run: ForwardPass, name: str, n: int, split: Split, stack: ExitStack) -> PlacedTensor:
    """Room for `n` features of every token, over columns as `split` says, for as long as `stack` is open."""
    return stack.enter_context(run.empty(name, run.wafer.placement((run.bands.n_tokens, n), run.place.axis0, ("col", split))))


def product(run: ForwardPass, x: PlacedTensor, weight: str, out: PlacedTensor) -> None:
    """``out = x @ weight``, complete on every row of a token's band."""
    matrix = run.weights.matrix(layer_prefix(run.current_layer) + weight, x.placement.shape[1], out.placement.shape[1])
    matmul(run.wafer, x, matrix, out, run.bands, chunk=run.options.piece)
    all_gather_bands(run.wafer, out, run.bands)


def _norm(run: ForwardPass, x: PlacedTensor, weight: str, out: PlacedTensor) -> None:
    name = layer_prefix(run.current_layer) + weight
    rms_norm(run.wafer, x, name, run.weights.vector(name), _latent(run).norm_eps, out, run.bands)


def _short_queries(run: ForwardPass, normal: PlacedTensor, rank: int, stack: ExitStack) -> PlacedTensor:
    """``norm(x @ w_q_a)``."""
    split = Split.balanced(rank, run.wafer.cols)
    out = place(run, "normalised query latent", rank, split, stack)
    with run.scope("qkv"), ExitStack() as inner:
        short = place(run, "query latent", rank, split, inner)
        product(run, normal, "w_q_a", short)
        run.tap("query_a", short)
        _norm(run, short, "q_a_norm", out)
        run.tap("query_a_norm", out)
    return out


def _queries(run: ForwardPass, latent: LatentAttention, source: PlacedTensor, qk: PlacedTensor) -> None:
    """Queries: those elements that are rotated, and the others through ``w_uk``."""
    spec, heads, n_heads = run.spec, run.heads, run.spec.num_heads
    nope, rope, units = latent.qk_nope_head_dim, spec.head_dim, Split.balanced(latent.qk_nope_head_dim // 2, run.wafer.cols)
    with ExitStack() as stack:
        q_nope = place(run, "queries", nope * n_heads, units.scaled(2 * n_heads), stack)
        q_rope = place(run, "rotary queries", rope * n_heads, heads.rotary_units.scaled(2 * n_heads), stack)
        with run.scope("qkv"):
            product(run, source, "w_q_nope", q_nope)
            product(run, source, "w_q_rope", q_rope)
            if run.result.taps is not None:
                halves = _published(run, q_nope, n_heads), _published(run, q_rope, n_heads, rotary=True)
                run.result.taps.stages[run.layer, "query"] = np.concatenate(halves, axis=2)
        _rotate(run, q_rope)
        if run.result.taps is not None:
            run.result.taps.stages[run.layer, "query_rope"] = _published(run, q_rope, n_heads, rotary=True)
        with run.scope("absorb"):
            run.wafer.launch(PUT_SLOTS, x=q_rope, n=n_heads, slot=0, n_slots=n_heads + 1, last=1, out=qk)
            w_uk = run.weights.heads(layer_prefix(run.current_layer) + "w_uk", nope, latent.kv_lora_rank)
            head_products(run.wafer, q_nope, units, w_uk, qk, heads.value_units, n_heads + 1, run.bands, chunk=run.options.piece)


def _key(run: ForwardPass, latent: LatentAttention, normal: PlacedTensor, qk: PlacedTensor) -> None:
    """The latent after its norm, and the rotary key."""
    spec, heads, rank = run.spec, run.heads, latent.kv_lora_rank
    slots = {"n": 1, "slot": spec.num_heads, "n_slots": spec.num_heads + 1}
    with ExitStack() as stack:
        key = place(run, "rotary key", spec.head_dim, heads.rotary_units.scaled(2), stack)
        out = place(run, "normalised latent", rank, heads.value_units.scaled(2), stack)
        with run.scope("qkv"), ExitStack() as inner:
            short = place(run, "latent", rank, heads.value_units.scaled(2), inner)
            product(run, normal, "w_kv_a", short)
            product(run, normal, "w_k_rope", key)
            if run.result.taps is not None:
                both = _published(run, short, 1)[:, 0], _published(run, key, 1, rotary=True)[:, 0]
                run.result.taps.stages[run.layer, "latent_a"] = np.concatenate(both, axis=1)
            _norm(run, short, "kv_a_norm", out)
            run.tap("latent", out)
        _rotate(run, key)
        if run.result.taps is not None:
            run.result.taps.stages[run.layer, "rope_key"] = _published(run, key, 1, rotary=True)[:, 0]
        with run.scope("absorb"):
            run.wafer.launch(PUT_SLOTS, x=out, last=0, out=qk, **slots)
            run.wafer.launch(PUT_SLOTS, x=key, last=1, out=qk, **slots)
            if run.result.taps is not None:
                rows = _published(run, qk, spec.num_heads + 1)
                run.result.taps.stages[run.layer, "query_latent"] = np.ascontiguousarray(rows[:, : spec.num_heads, :rank])


def _rotate(run: ForwardPass, x: PlacedTensor) -> None:
    cos, sin = run.rotary(run.current_layer)
    with run.scope("rotary"):
        run.wafer.launch(ROTATE_SLOTS, x=x, cos=cos, sin=sin)
