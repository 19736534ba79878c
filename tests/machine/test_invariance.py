"""What the result may not depend on: rows, prompt chunks, padding, neighbours, the cache, and how weights are streamed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_emu.engine.inference import Engine
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import sequences_of
from wse_emu.memoryx import ArrayStore, open_store
from wse_emu.model import WaferModel

from .models import CONFIGS, make_model
from .test_executors import FAMILIES, assert_same, everything, prompt_of


@settings(max_examples=10)
@given(FAMILIES, st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_any_number_of_rows_gives_the_same_bits(family, rows, other, cols, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    assert_same(*(everything(make_model(family, n, cols), ids, mask) for n in (rows, other)))


@settings(max_examples=10)
@given(FAMILIES, st.integers(1, 13), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_any_prompt_chunk_gives_the_same_bits(family, chunk, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    whole, cut = make_model(family, 4, 3), make_model(family, 4, 3, prefill_chunk=chunk)
    assert_same(everything(whole, ids, mask), everything(cut, ids, mask))
    record, pieces = whole.record(ids, mask), cut.record(ids, mask)
    assert list(record.stages) == list(pieces.stages)
    assert_same(list(record.stages.values()), list(pieces.stages.values()))
    np.testing.assert_array_equal(record.pos, pieces.pos)


@settings(max_examples=8)
@given(FAMILIES, st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_alone_is_as_in_a_batch_and_padding_changes_nothing(family, rows, cols, lengths) -> None:
    ids, mask = prompt_of(lengths, CONFIGS[family]["vocab_size"])
    model = make_model(family, rows, cols)
    together, generated = model(ids, mask), model.generate(ids, 4, attention_mask=mask)
    for i, n in enumerate(lengths):
        alone = model(ids[i, -n:])
        np.testing.assert_array_equal(together.logits[i, -n:], alone.logits[0])
        assert not together.logits[i, :-n].any()
        np.testing.assert_array_equal(generated[i, -n - 4 :], model.generate(ids[i, -n:], 4))
        for layer, chosen in enumerate(alone.topk_ids):
            np.testing.assert_array_equal(together.topk_ids[layer][i, -n:], chosen[0])


@settings(max_examples=8)
@given(FAMILIES, st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_cached_decode_is_full_recomputation(family, rows, cols, n_prompt, n_new) -> None:
    ids, _ = prompt_of([n_prompt + n_new], CONFIGS[family]["vocab_size"])
    model = make_model(family, rows, cols)
    full = model(ids).logits[0]
    engine = Engine(model.wafer, model.store)
    cache = engine.new_cache([n_prompt + n_new])
    first = engine.forward(ids[0, :n_prompt], sequences_of([0], [n_prompt], [0]), cache, np.arange(n_prompt))
    np.testing.assert_array_equal(first.logits, full[:n_prompt])
    for at in range(n_prompt, n_prompt + n_new):
        step = engine.forward(ids[0, at : at + 1], sequences_of([0], [1], [at]), cache, np.arange(1))
        np.testing.assert_array_equal(step.logits[0], full[at])
        rows_held = cache.split(0, cache.keys_held(0, 0)).sizes
        assert rows_held.max() - rows_held.min() <= 1
    cache.free()
    assert not model.wafer.sram.live


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_pieces_prefetch_and_stores_change_no_bit(family: str, tmp_path) -> None:
    ids, mask = prompt_of([7, 3], CONFIGS[family]["vocab_size"])
    model = make_model(family, 4, 4)
    expected = everything(model, ids, mask)
    for options in ({"chunk": 2}, {"chunk": 64}, {"prefetch_depth": 0}, {"prefetch_depth": 3}, {"stream_experts": "all"}):
        assert_same(expected, everything(make_model(family, 4, 4, **options), ids, mask))
    for resident_bytes in (0, 1 << 20):
        store = open_store(model.checkpoint, cache_dir=tmp_path, resident_bytes=resident_bytes)
        mapped = WaferModel(model.checkpoint, store, make_model(family, 4, 4).wafer, None, None, EngineOptions())
        assert_same(expected, everything(mapped, ids, mask))
        mapped.close()
    assert isinstance(model.store, ArrayStore)


def test_streaming_only_chosen_experts_saves_exactly_the_others() -> None:
    ids, mask = prompt_of([2], CONFIGS["mixtral"]["vocab_size"])
    streamed = {}
    for policy in ("activated", "all"):
        model = make_model("mixtral", 3, 4, stream_experts=policy)
        out = model(ids, mask)
        rows = [e for e in model.wafer.ledger.events() if e.kind == "stream" and ".experts." in e.name]
        streamed[policy] = {(e.layer, int(e.name.split(".")[3])) for e in rows}
        for layer, chosen in enumerate(out.topk_ids):
            used = {int(e) for e in np.unique(chosen)}
            assert {e for at, e in streamed[policy] if at == layer} == (used if policy == "activated" else set(range(5)))
    assert streamed["activated"] < streamed["all"]


def test_no_token_is_dropped_and_each_has_exactly_k_experts() -> None:
    ids, mask = prompt_of([30, 11], CONFIGS["mixtral"]["vocab_size"])
    out = make_model("mixtral", 4, 4)(ids, mask)
    for chosen, weights in zip(out.topk_ids, out.topk_weights, strict=True):
        real = chosen[mask.astype(bool)]
        assert sum(Counter(real.ravel().tolist()).values()) == 41 * 2
        assert all(len(set(row)) == 2 for row in real.tolist())
        np.testing.assert_allclose(weights[mask.astype(bool)].sum(axis=-1), 1, atol=3 * 2.0**-24)


def test_only_tokens_weights_and_logits_cross_the_edge() -> None:
    ids, mask = prompt_of([6], CONFIGS["mixtral"]["vocab_size"])
    model = make_model("mixtral", 3, 3)
    model.generate(ids, 3, attention_mask=mask)
    kinds = {e.kind for e in model.wafer.ledger.events()}
    assert "probe" not in kinds
    outside = {e.stage for e in model.wafer.ledger.events() if e.kind in ("inject", "drain")}
    assert outside == {"embedding", "lm_head"}
    drained = sum(e.bytes for e in model.wafer.ledger.events() if e.kind == "drain")
    assert drained == 3 * CONFIGS["mixtral"]["vocab_size"] * 4
