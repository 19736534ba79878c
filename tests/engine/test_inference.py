"""The engine without the face: options, what it refuses, and forward passes on a cache that the caller holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import random_checkpoint
from wse_emu.engine import attention_block
from wse_emu.engine.inference import Engine, shape_engine
from wse_emu.engine.options import CHUNKS, EngineOptions
from wse_emu.engine.plan import sequences_of
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.errors import StoreError
from wse_emu.layers.linear import DEFAULT_CHUNK
from wse_emu.memoryx import ArrayStore
from wse_kernels.threads import SharedDriver, Unfinished

SPEC = wse.ModelSpec(
    family="mixtral", vocab_size=40, hidden_size=12, intermediate_size=10, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6,
    rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=32, num_experts=4, top_k=2, moe_intermediate_size=10,
)  # fmt: skip
STORE = ArrayStore(random_checkpoint(SPEC, 1))
TOKENS = np.arange(7, dtype=np.int64)
TWO = sequences_of([0, 1], [4, 3], [0, 0])


def engine_on(executor: str = "batched", **options: Any) -> Engine:
    wafer = wse.Wafer(rows=3, cols=2, executor=executor)
    options_ = EngineOptions(**options)
    return shape_engine(wafer, SPEC, options_) if executor == "dry" else Engine(wafer, STORE, options_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream_experts": None}, "`stream_experts` must be 'activated' or 'all', got None"),
        ({"chunk": 1}, "`chunk` must be an integer >= 2 or None, got 1"),
        ({"chunk": 4.0}, r"`chunk` must be an integer >= 2 or None, got 4\.0"),
        ({"prefetch_depth": True}, "`prefetch_depth` must be an integer >= 0, got True"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wse.SpecError, match=message):
        EngineOptions(**options)


def test_pieces_have_a_default_and_smaller_sizes_to_fall_back_on() -> None:
    assert EngineOptions().piece == DEFAULT_CHUNK == CHUNKS[0]
    assert EngineOptions(chunk=6).piece == 6
    assert list(CHUNKS) == sorted(CHUNKS, reverse=True)


@pytest.mark.parametrize("wanted", [[0], [3, 6], [0, 1, 2, 3, 4, 5, 6], []])
def test_only_wanted_logits_are_computed_and_they_are_the_same(wanted: list[int]) -> None:
    engine = engine_on()
    results = []
    for tokens in (np.arange(7), np.array(wanted, np.int64)):
        cache = engine.new_cache([4, 3])
        results.append(engine.forward(TOKENS, TWO, cache, tokens).logits)
        cache.free()
    assert results[1].shape == (len(wanted), 40)
    np.testing.assert_array_equal(results[1], results[0][wanted])
    drained = [e.bytes for e in engine.wafer.ledger.events() if e.kind == "drain"]
    assert drained == [7 * 40 * 4, len(wanted) * 40 * 4]


def test_the_cache_is_the_callers_and_all_else_is_given_back() -> None:
    engine = engine_on("isolated")
    cache = engine.new_cache([5, 3])
    held = engine.wafer.sram.live
    engine.forward(TOKENS, TWO, cache, np.arange(7))
    assert engine.wafer.sram.live == held
    assert cache.lengths.tolist() == [4, 3]
    engine.forward(np.array([9]), sequences_of([0], [1], [4]), cache, np.arange(1))
    assert cache.lengths.tolist() == [5, 3]
    cache.free()
    assert not engine.wafer.sram.live


@pytest.mark.parametrize("executor", ["batched", "isolated", "dry"])
def test_tokens_beyond_the_cache_are_refused_before_anything_happens(executor: str) -> None:
    engine = engine_on(executor)
    cache = engine.new_cache([4, 2])
    with pytest.raises(wse.InputError, match="sequence 1: 3 tokens do not fit a cache of 2"):
        engine.forward(TOKENS, TWO, cache, np.arange(7), trace=RoutingTrace.worst_case(2, 7, 4, 2))
    assert not engine.wafer.ledger.events()
    assert cache.lengths.tolist() == [0, 0]


def test_a_dry_pass_without_a_trace_is_refused_and_leaves_only_the_cache() -> None:
    engine = engine_on("dry")
    cache = engine.new_cache([4, 3])
    held = engine.wafer.sram.live
    with pytest.raises(wse.TraceError, match="the `dry` executor needs a routing trace"):
        engine.forward(TOKENS, TWO, cache, np.arange(7))
    assert engine.wafer.sram.live == held
    assert cache.lengths.tolist() == [0, 0], "tokens of a pass that failed are not there"


def test_every_event_of_a_pass_is_attributed_to_a_layer_and_a_stage() -> None:
    engine = engine_on()
    cache = engine.new_cache([4, 3])
    engine.forward(TOKENS, TWO, cache, np.arange(7), hidden_states=True)
    order = list(dict.fromkeys((e.layer, e.stage) for e in engine.wafer.ledger.events()))
    stages = ["attention_norm", "qkv", "rotary", "kv_cache", "attention", "attention_out", "ffn_norm", "router", "experts", "probe"]
    inside = [(layer, stage) for layer in (0, 1) for stage in stages]
    assert order == [(None, "embedding"), (None, "probe"), *inside, (None, "final_norm"), (None, "lm_head")]


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("policy", ["activated", "all"])
def test_a_stream_for_several_passes_prepares_what_each_layer_needs_and_drops_it(depth: int, policy: str, monkeypatch) -> None:
    engine = engine_on(prefetch_depth=depth, stream_experts=policy)
    resident: list[str] = []
    most = 0

    def prepare(names: list[str]) -> None:
        nonlocal most
        resident.extend(names)
        most = max(most, len({name.split(".")[1] for name in resident if name.startswith("layers.")}))

    def drop(names: list[str]) -> None:
        for name in names:
            resident.remove(name)

    used = engine.store.tiles

    def tiles(name: str) -> np.ndarray:
        assert name in resident, f"`{name}` is used without having been made resident"
        return used(name)

    for method, stand_in in (("prepare", prepare), ("drop", drop), ("tiles", tiles)):
        monkeypatch.setattr(engine.store, method, stand_in)
    cache = engine.new_cache([6, 3])
    with engine.streaming():
        engine.forward(TOKENS, TWO, cache, np.arange(7))
        for at in (4, 5):
            engine.forward(TOKENS[:1], sequences_of([0], [1], [at]), cache, np.arange(1))
    assert resident == []
    assert 1 <= most <= (1 if depth == 0 else 2), "a layer, and the next one only if it is prefetched"


def test_a_pass_that_fails_leaves_nobody_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody takes what it placed off the wafer: the caller may go on with the cache."""
    engine = engine_on()
    cache = engine.new_cache([4, 3])
    monkeypatch.setattr(
        SharedDriver, "begin", lambda self, units, *args: Unfinished(self.function, 1, np.zeros(2, np.int64), args)
    )  # nothing is computed before somebody looks

    def fail(*args: Any, **kwargs: Any) -> None:
        assert not engine.wafer.pending.is_empty
        raise StoreError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(attention_block, "attention", fail)
        with engine.streaming(), pytest.raises(StoreError, match="gone"):  # with prefetch, which lets go of weights behind the line
            engine.forward(TOKENS, TWO, cache, np.arange(7))
    assert engine.wafer.pending.is_empty
    assert engine.wafer.pending.check is None
