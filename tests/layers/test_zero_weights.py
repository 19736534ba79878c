"""Zeros that stay behind: bytes, wavelets and hops follow the other weights, and no bit of a result changes."""

from __future__ import annotations

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.layers.linear import all_gather_bands, matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.placement import Split, TokenBands

from .programs import room, streamed, tokens

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "eos_token_id": None,
}  # fmt: skip


def sparse_weights(n_in: int, n_out: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(n_in)
    w = rng.standard_normal((n_in, n_out)).astype(np.float32)
    w[rng.random(w.shape) < share] = 0.0
    w[rng.random(w.shape) < 0.1] = -0.0
    w[:, :4] = 0.0  # messages without a weight
    return w


@pytest.mark.parametrize(("n_tokens", "rows", "cols"), [(7, 3, 4), (2, 7, 3)])
def test_a_product_has_the_same_bits_also_of_what_is_not_finite(n_tokens: int, rows: int, cols: int) -> None:
    w = sparse_weights(23, 30, 0.7)
    x = np.random.default_rng(1).standard_normal((n_tokens, 23)).astype(np.float32)
    x[0, 3], x[-1, 5], x[0, 7], x[-1] = np.inf, np.nan, -0.0, x[-1] * np.float32(1e-38)
    found, events = [], []
    for executor in ("batched", "isolated"):
        for skip in (False, True):
            wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=executor)
            bands = TokenBands(n_tokens, rows)
            matrix = streamed(wafer, w)
            matrix = StreamedMatrix(matrix.name, matrix.n_in, matrix.n_out, matrix.tiles, 2 * w.size, skip)
            placed, out = tokens(wafer, x, bands, Split.balanced(23, cols)), room(wafer, bands, Split.balanced(30, cols))
            with np.errstate(all="ignore"), placed, out:
                matmul(wafer, placed, matrix, out, bands, chunk=4)
                all_gather_bands(wafer, out, bands)
                found.append(out.gather().view(np.uint32))
            events.append([e for e in wafer.ledger.events() if e.name == "w" or e.kind == "launch"])
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    assert events[0] == events[2]
    assert events[1] == events[3]
    n = int(np.count_nonzero(w.view(np.uint32)))
    assert np.count_nonzero(w) < n < w.size, "-0 is sent"
    dense, skipped = events[0][0], events[1][0]
    assert (dense.bytes, dense.wavelets) == (2 * w.size, w.size)
    assert (skipped.bytes, skipped.wavelets) == (2 * n, n)
    assert skipped.count < dense.count
    assert skipped.max_link_wavelets < dense.max_link_wavelets
    assert events[0][1:] == events[1][1:], "nothing else changes"


def test_a_sparse_model_streams_in_proportion_and_gives_the_same_bits() -> None:
    ids, results, streams = np.arange(10).reshape(2, 5), [], []
    for executor, skip in (("batched", False), ("batched", True), ("isolated", True), ("dry", True)):
        model = wse.from_config(MIXTRAL, seed=2, wafer=wse.Wafer(wse.WSE3, rows=2, cols=3, executor=executor), skip_zero_weights=skip)
        if executor != "dry":
            _prune(model)
            results.append(model(ids, output_router_logits=True))
            model.generate(ids, 2)
        else:
            model(ids)
        streams.append([e for e in model.wafer.ledger.events() if e.kind == "stream"])
    for out in results[1:]:
        assert np.array_equal(out.logits, results[0].logits)
    assert streams[1] == streams[2]
    dense, sparse = ({(e.layer, e.name): e for e in events} for events in streams[:2])
    for key, event in sparse.items():
        if key[1].endswith(("w_qkv", "w_o", "w_down", "w_gate_up")):
            assert event.bytes == pytest.approx(0.25 * dense[key].bytes, rel=0.2)
        else:
            assert event == dense[key], "vectors, the router and the head, which was not pruned"
    assert {e.name: e.bytes for e in streams[3]} == {e.name: e.bytes for e in streams[0] if e.name in {x.name for x in streams[3]}}
    with pytest.raises(wse.SpecError, match="`skip_zero_weights` must be True or False, got 1"):
        wse.from_config(MIXTRAL, skip_zero_weights=1)


def _prune(model: wse.WaferModel) -> None:
    """Three of four weights of every matrix but router and head become zero."""
    real = model.store.tiles
    kept: dict[str, np.ndarray] = {}

    def tiles(name: str) -> np.ndarray:
        if name not in kept:
            kept[name] = real(name).copy()
            if not name.endswith(("router", "lm_head")):
                kept[name][np.random.default_rng(len(name) + kept[name].size).random(kept[name].shape) < 0.75] = 0
            kept[name].flags.writeable = False
        return kept[name]

    model.store.tiles = tiles  # type: ignore[method-assign]
