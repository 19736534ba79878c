"""The wafer layout and its inverse, for every shape of heads, and what a build refuses."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wse_emu.checkpoint import Checkpoint, open_checkpoint, published_names, random_checkpoint
from wse_emu.foundation.errors import CheckpointError, StoreError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.weights import TILE_COLS, WeightShape, all_weights
from wse_emu.memoryx import ArrayStore, context_to_published, layout_bytes, qkv_to_published
from wse_emu.memoryx.layout import Layout, context_order, tile_matrix, untile_matrix
from wse_emu.testing import contract_specs, write_checkpoint
from wse_emu.testing.weight_store import layout_matrix


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv, per_kv = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts, width = draw(st.integers(0, 3)), draw(st.integers(1, 150))
    return ModelSpec(
        family="mixtral" if experts else "llama",
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 40)),
        intermediate_size=width,
        num_layers=1,
        num_heads=kv * per_kv,
        num_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 20)),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=8,
        tie_word_embeddings=draw(st.booleans()),
        num_experts=experts,
        top_k=min(experts, 1),
        moe_intermediate_size=width if experts else 0,
    )


@given(specs())
@settings(deadline=None, max_examples=40)
def test_projections_through_the_layout_are_the_published_ones(spec: ModelSpec) -> None:
    """Integers, so that every order of summation is exact."""
    checkpoint = random_checkpoint(spec, seed=0)
    rng = np.random.default_rng(0)
    published = published_names(spec)
    weights = {t.name: rng.integers(-8, 8, t.shape).astype(np.float32) for t in published.values()}
    store = ArrayStore(with_tensors(checkpoint, weights))

    def matrix(name: str) -> np.ndarray:
        shape = next(w.shape for w in all_weights(spec) if w.name == name)
        return untile_matrix(store.tiles(name), *shape)

    x = rng.integers(-8, 8, (3, spec.hidden_size)).astype(np.float32)
    q, k, v = qkv_to_published(x @ matrix("layers.0.w_qkv"), spec)
    for value, role, heads in ((q, "w_q", spec.num_heads), (k, "w_k", spec.num_kv_heads), (v, "w_v", spec.num_kv_heads)):
        expected = (x @ weights[published["layers.0." + role].name].T).reshape(3, heads, spec.head_dim)
        np.testing.assert_array_equal(value, expected)
        assert value.flags.c_contiguous

    context = rng.integers(-8, 8, (3, spec.num_heads * spec.head_dim)).astype(np.float32)
    expected = context_to_published(context, spec) @ weights[published["layers.0.w_o"].name].T
    np.testing.assert_array_equal(context @ matrix("layers.0.w_o"), expected)

    prefix = "layers.0.experts.0." if spec.is_moe else "layers.0."
    both = x @ matrix(prefix + "w_gate_up")
    np.testing.assert_array_equal(both[:, 0::2], x @ weights[published[prefix + "w_gate"].name].T)
    np.testing.assert_array_equal(both[:, 1::2], x @ weights[published[prefix + "w_up"].name].T)
    np.testing.assert_array_equal(matrix(prefix + "w_down"), weights[published[prefix + "w_down"].name].T)
    np.testing.assert_array_equal(matrix("lm_head"), weights[published["lm_head"].name].T)
    if spec.is_moe:
        np.testing.assert_array_equal(matrix("layers.0.router"), weights[published["layers.0.router"].name].T)


class _Given:
    """Tensors from a dictionary."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = weights
        self.fingerprint = "given"

    def names(self) -> list[str]:
        return sorted(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape

    def dtype(self, name: str) -> str:
        return "float32"

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.weights[name][start:stop]

    def close(self) -> None: ...


def with_tensors(checkpoint: Checkpoint, weights: dict[str, np.ndarray]) -> Checkpoint:
    return Checkpoint(name="given", spec=checkpoint.spec, config=checkpoint.config, tensors=_Given(weights), fingerprint="given")


@given(specs(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_context_order_is_a_permutation_and_agrees_with_its_inverse(spec: ModelSpec, tokens: int) -> None:
    order = context_order(spec)
    n = spec.num_heads * spec.head_dim
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    published = np.arange(tokens * n).reshape(tokens, n)
    np.testing.assert_array_equal(context_to_published(published[:, order], spec), published)


def test_a_rotary_pair_and_its_queries_are_neighbours() -> None:
    spec = contract_specs()["mixtral"]  # 12 query heads, 4 key heads, 10 elements a head
    columns = np.arange(20 * 10, dtype=np.int64)[None]
    q, k, v = (a[0] for a in qkv_to_published(columns, spec))
    np.testing.assert_array_equal(k[1, [0, 5]], [(1 * 5 * 5 + 3) * 2, (1 * 5 * 5 + 3) * 2 + 1])
    np.testing.assert_array_equal(v[0, [2, 7]], [(2 * 5 + 4) * 2, (2 * 5 + 4) * 2 + 1])
    np.testing.assert_array_equal(q[[3, 4, 5], 0], [50, 52, 54])


@pytest.mark.parametrize("shape", [(3, 199), (200,), (1, 2, 200)])
def test_wrong_number_of_columns_raises(shape: tuple[int, ...]) -> None:
    spec = contract_specs()["mixtral"]
    with pytest.raises(StoreError, match=r"`qkv` must have shape \(T, 200\)"):
        qkv_to_published(np.zeros(shape), spec)
    with pytest.raises(StoreError, match=r"`context` must have shape \(T, 120\)"):
        context_to_published(np.zeros(shape), spec)


@given(st.integers(1, 20), st.integers(1, 400))
@settings(deadline=None)
def test_tiling_has_an_inverse(n_in: int, n_out: int) -> None:
    matrix = np.arange(n_in * n_out, dtype=np.float32).reshape(n_in, n_out)
    flat = tile_matrix(matrix)
    np.testing.assert_array_equal(untile_matrix(flat, n_in, n_out), matrix)
    first = min(TILE_COLS, n_out)
    np.testing.assert_array_equal(flat[: n_in * first].reshape(n_in, first), matrix[:, :first])
    with pytest.raises(StoreError, match="a tiled"):
        untile_matrix(flat, n_in, n_out + 1)


def test_layout_bytes_counts_every_tensor_and_a_tied_head_too() -> None:
    for spec in contract_specs().values():
        extra = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
        assert layout_bytes(spec) == 4 * (spec.n_params + extra)


@pytest.mark.parametrize(
    ("tensor", "index"),
    [
        ("model.embed_tokens.weight", (130, 19)),
        ("model.layers.1.input_layernorm.weight", (4,)),
        ("model.layers.0.self_attn.q_proj.weight", (119, 3)),
        ("model.layers.1.self_attn.v_proj.weight", (39, 0)),
        ("model.layers.0.block_sparse_moe.experts.2.w3.weight", (66, 1)),
        ("model.layers.0.block_sparse_moe.gate.weight", (1, 1)),
        ("lm_head.weight", (128, 2)),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_named(tensor: str, index: tuple[int, ...], value: float) -> None:
    checkpoint = random_checkpoint(contract_specs()["mixtral"], seed=0)
    weights = {n: checkpoint.tensors.read(n).copy() for n in checkpoint.tensors.names()}
    weights[tensor][index] = value
    store = ArrayStore(with_tensors(checkpoint, weights))

    def make_all() -> None:
        store.embed(np.zeros(1, np.int64))
        store.prepare([w.name for w in all_weights(checkpoint.spec) if w.name != "embed"])

    with pytest.raises(CheckpointError) as e:
        make_all()
    assert f"{tensor}[{', '.join(map(str, index))}] is {value}; weights must be finite" in str(e.value)


def test_a_tied_head_that_differs_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = random_checkpoint(contract_specs()["llama-tied"], seed=0)
    head = checkpoint.tensors.read("model.embed_tokens.weight").copy()
    equal = open_checkpoint(write_checkpoint(checkpoint, tmp_path_factory.mktemp("a"), replace={"lm_head.weight": head}))
    np.testing.assert_array_equal(ArrayStore(equal).tiles("lm_head"), ArrayStore(checkpoint).tiles("lm_head"))
    head[129, 0] += 1
    other = open_checkpoint(write_checkpoint(checkpoint, tmp_path_factory.mktemp("b"), replace={"lm_head.weight": head}))
    with pytest.raises(CheckpointError, match=r"`tie_word_embeddings` is true, but lm_head\.weight differs .* in rows 128\.\.130"):
        ArrayStore(other).tiles("lm_head")


def test_chunks_are_bounded_however_large_the_tensor() -> None:
    """25 MB of head and 25 MB of embedding come in pieces of a tile or of 4 MB."""
    spec = ModelSpec(
        family="llama",
        vocab_size=25_000,
        hidden_size=250,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=8,
    )
    checkpoint = random_checkpoint(spec, seed=0)
    layout = Layout(checkpoint.tensors, spec, "test")
    tracemalloc.start()
    try:
        for weight in (WeightShape("embed", (25_000, 250)), WeightShape("lm_head", (250, 25_000))):
            tracemalloc.reset_peak()
            assert sum(chunk.size for chunk in layout.chunks(weight)) == weight.size
            assert tracemalloc.get_traced_memory()[1] < 16e6
    finally:
        tracemalloc.stop()


def test_the_definition_used_by_the_contract_is_a_permutation_of_the_published_values() -> None:
    checkpoint = random_checkpoint(contract_specs()["mixtral"], seed=0)
    published = published_names(checkpoint.spec)
    for name, roles in (("layers.1.w_qkv", ("w_q", "w_k", "w_v")), ("layers.1.w_o", ("w_o",))):
        parts = [checkpoint.tensors.read(published["layers.1." + r].name).reshape(-1) for r in roles]
        np.testing.assert_array_equal(np.sort(layout_matrix(checkpoint, name), axis=None), np.sort(np.concatenate(parts)))
