"""The dense reference: against the formulas written again as loops over numbers, and against what must hold for any transformer."""

import math
from dataclasses import replace

import numpy as np
import pytest

from wse_emu.foundation.errors import CheckpointError, InputError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import DenseReference, formulas, routing

MOE = ModelSpec(
    family="mixtral",
    vocab_size=23,
    hidden_size=12,
    intermediate_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    max_position_embeddings=64,
    num_experts=5,
    top_k=2,
    moe_intermediate_size=10,
)
DENSE = replace(MOE, family="llama", num_experts=0, top_k=0, moe_intermediate_size=0)
IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
SEQ = np.array([0, 0, 0, 0, 0, 1, 1, 1])
POS = np.array([0, 1, 2, 3, 4, 0, 1, 2])


def random_weights(spec, seed=0):
    rng = np.random.default_rng(seed)
    h, f, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, h), "model.norm.weight": (h,)}
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    for n in range(spec.num_layers):
        p = f"model.layers.{n}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {p + f"self_attn.{x}_proj.weight": (spec.num_kv_heads * d, h) for x in "kv"}
        shapes |= {p + "self_attn.q_proj.weight": (spec.num_heads * d, h), p + "self_attn.o_proj.weight": (h, spec.num_heads * d)}
        if spec.is_moe:
            shapes[p + "block_sparse_moe.gate.weight"] = (spec.num_experts, h)
            for e in range(spec.num_experts):
                q = f"{p}block_sparse_moe.experts.{e}."
                shapes |= {q + "w1.weight": (f, h), q + "w3.weight": (f, h), q + "w2.weight": (h, f)}
        else:
            shapes |= {p + f"mlp.{x}_proj.weight": (f, h) for x in ("gate", "up")} | {p + "mlp.down_proj.weight": (h, f)}
    return {
        name: (1 + 0.1 * rng.standard_normal(s) if len(s) == 1 else rng.standard_normal(s) / math.sqrt(s[1])).astype(np.float32)
        for name, s in shapes.items()
    }


def forward(spec, weights, ids=IDS, seq=SEQ, pos=POS, **options):
    dtype = options.pop("dtype", np.float64)
    return DenseReference(spec, weights.__getitem__, dtype=dtype).forward(ids, seq, pos, **options)


def by_loops(spec, weights, ids):
    """Logits of one sequence, number by number, without a matrix product, a mask or a batch: only the experts that are chosen."""
    w = {name: value.astype(float).tolist() for name, value in weights.items()}

    def mat(name, x):
        return [sum(a * b for a, b in zip(row, x, strict=True)) for row in w[name]]

    def norm(name, x):
        r = math.sqrt(sum(a * a for a in x) / len(x) + spec.rms_norm_eps)
        return [a / r * b for a, b in zip(x, w[name], strict=True)]

    def turn(x, at):
        d, out = spec.head_dim, list(x)
        for start in range(0, len(x), d):
            for u in range(d // 2):
                angle = at / spec.rope_theta ** (2 * u / d)
                a, b = x[start + u], x[start + u + d // 2]
                out[start + u] = a * math.cos(angle) - b * math.sin(angle)
                out[start + u + d // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def swiglu(g, u, dn, x):
        return mat(dn, [a / (1 + math.exp(-a)) * b for a, b in zip(mat(g, x), mat(u, x), strict=True)])

    cache = [([], []) for _ in range(spec.num_layers)]
    logits, d = [], spec.head_dim
    for at, token in enumerate(ids):
        x = w["model.embed_tokens.weight"][token]
        for n in range(spec.num_layers):
            p = f"model.layers.{n}."
            y = norm(p + "input_layernorm.weight", x)
            q = turn(mat(p + "self_attn.q_proj.weight", y), at)
            cache[n][0].append(turn(mat(p + "self_attn.k_proj.weight", y), at))
            cache[n][1].append(mat(p + "self_attn.v_proj.weight", y))
            context = []
            for head in range(spec.num_heads):
                g = head // (spec.num_heads // spec.num_kv_heads)
                scores = [sum(q[head * d + i] * k[g * d + i] for i in range(d)) / math.sqrt(d) for k in cache[n][0]]
                p_ = [math.exp(s) for s in scores]
                context += [sum(a * v[g * d + i] for a, v in zip(p_, cache[n][1], strict=True)) / sum(p_) for i in range(d)]
            x = [a + b for a, b in zip(x, mat(p + "self_attn.o_proj.weight", context), strict=True)]
            y = norm(p + "post_attention_layernorm.weight", x)
            if spec.is_moe:
                p += "block_sparse_moe."
                scores = [math.exp(s) for s in mat(p + "gate.weight", y)]
                chosen = sorted(range(spec.num_experts), key=lambda e: (-scores[e], e))[: spec.top_k]
                total = sum(scores[e] for e in chosen) if spec.routing.expert_weighting_normalization else sum(scores)
                for e in chosen:
                    out = swiglu(*(f"{p}experts.{e}.{m}.weight" for m in ("w1", "w3", "w2")), y)
                    x = [a + scores[e] / total * b for a, b in zip(x, out, strict=True)]
            else:
                out = swiglu(*(f"{p}mlp.{m}_proj.weight" for m in ("gate", "up", "down")), y)
                x = [a + b for a, b in zip(x, out, strict=True)]
        head = "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
        logits.append(mat(head, norm("model.norm.weight", x)))
    return np.array(logits)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(MOE, id="moe"),
        pytest.param(DENSE, id="dense"),
        pytest.param(replace(MOE, routing=RoutingRule(expert_weighting_normalization=False)), id="not-renormalized"),
        pytest.param(replace(MOE, tie_word_embeddings=True), id="tied"),
        pytest.param(replace(MOE, top_k=5), id="all-experts"),
        pytest.param(replace(DENSE, num_kv_heads=4), id="one-head-per-kv"),
    ],
)
def test_logits_equal_those_of_plain_loops(spec):
    weights = random_weights(spec)
    logits = forward(spec, weights)[None, "logits"]
    for s in (0, 1):
        np.testing.assert_allclose(logits[s == SEQ], by_loops(spec, weights, IDS[s == SEQ]), rtol=1e-12, atol=1e-13)


def test_a_later_token_changes_no_earlier_stage():
    weights = random_weights(MOE)
    other = IDS.copy()
    other[4] = 7  # the last token of sequence 0
    a, b = forward(MOE, weights), forward(MOE, weights, ids=other)
    for stage, value in a.items():
        np.testing.assert_array_equal(np.delete(value, 4, axis=0), np.delete(b[stage], 4, axis=0), err_msg=str(stage))
    assert not np.array_equal(a[None, "logits"][4], b[None, "logits"][4])


def test_order_of_the_flattened_tokens_does_not_matter():
    weights = random_weights(MOE)
    order = np.random.default_rng(1).permutation(len(IDS))
    a, b = forward(MOE, weights), forward(MOE, weights, IDS[order], SEQ[order], POS[order])
    for stage, value in a.items():
        np.testing.assert_allclose(b[stage], value[order], rtol=1e-12, atol=1e-13, err_msg=str(stage))


def test_rotary_scores_depend_on_the_distance_only():
    weights = random_weights(DENSE)
    a, b = forward(DENSE, weights), forward(DENSE, weights, pos=POS + 17)
    np.testing.assert_allclose(b[None, "logits"], a[None, "logits"], rtol=1e-11, atol=1e-12)
    assert not np.allclose(a[0, "q_rope"], b[0, "q_rope"])


def test_equal_experts_make_the_dense_model():
    dense = random_weights(DENSE)
    moe = random_weights(MOE) | {name: value for name, value in dense.items() if "mlp" not in name}
    for n in range(MOE.num_layers):
        for e in range(MOE.num_experts):
            for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                moe[f"model.layers.{n}.block_sparse_moe.experts.{e}.{ours}.weight"] = dense[f"model.layers.{n}.mlp.{theirs}_proj.weight"]
    np.testing.assert_allclose(forward(MOE, moe)[None, "logits"], forward(DENSE, dense)[None, "logits"], rtol=1e-12, atol=1e-13)


def test_equal_scores_choose_the_lowest_ids():
    weights = random_weights(MOE)
    weights["model.layers.0.block_sparse_moe.gate.weight"][:] = 0
    assert (forward(MOE, weights)[0, "topk_ids"] == [0, 1]).all()


def test_equal_scores_of_many_experts_choose_the_lowest_ids():
    logits = np.zeros((1, 300), np.float32)
    logits[0, [7, 250]] = 1
    assert routing.highest(logits, 6, "lowest_id").tolist() == [[7, 250, 0, 1, 2, 3]]


def test_combined_output_is_the_weighted_sum_of_the_chosen_experts():
    out = forward(MOE, random_weights(MOE))
    expected = (out[1, "topk_weights"][:, :, None] * out[1, "expert_out"]).sum(axis=1)
    np.testing.assert_allclose(out[1, "ffn_out"], expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(out[1, "topk_weights"].sum(axis=1), 1, rtol=1e-15)


def test_replaying_its_own_routing_changes_no_bit_and_another_routing_is_obeyed():
    weights = random_weights(MOE)
    a = forward(MOE, weights)
    own = {n: a[n, "topk_ids"] for n in range(2)}
    for stage, value in forward(MOE, weights, routing=own).items():
        np.testing.assert_array_equal(value, a[stage], err_msg=str(stage))
    other = {0: own[0], 1: own[1][:, ::-1]}  # the same sets, in the other slot order
    b = forward(MOE, weights, routing=other)
    np.testing.assert_array_equal(b[1, "topk_ids"], own[1][:, ::-1])
    np.testing.assert_array_equal(b[1, "expert_out"], a[1, "expert_out"][:, ::-1])
    np.testing.assert_array_equal(b[1, "topk_weights"], a[1, "topk_weights"][:, ::-1])


def test_float32_twin_is_float32_throughout_and_close():
    weights = random_weights(MOE)
    exact, twin = forward(MOE, weights), forward(MOE, weights, dtype=np.float32)
    assert list(twin) == list(exact)
    for stage, value in twin.items():
        if stage[1] == "topk_ids":
            np.testing.assert_array_equal(value, exact[stage])
            continue
        assert value.dtype == np.float32, stage
        assert exact[stage].dtype == np.float64, stage
        assert 0 <= np.abs(value - exact[stage]).max() < 2e-5 * np.abs(exact[stage]).max(), stage
    assert not np.array_equal(twin[None, "logits"], exact[None, "logits"])


def test_tensors_are_read_layer_by_layer_and_once():
    weights, names = random_weights(MOE), []
    stages = DenseReference(MOE, lambda name: names.append(name) or weights[name]).stages(IDS, SEQ, POS)
    for (layer, _), _ in stages:
        assert layer is None or not any(name.startswith(f"model.layers.{layer + 1}.") for name in names)
    assert sorted(names) == sorted(weights)


def test_nudge_multiplies_the_embedding():
    weights, nudge = random_weights(MOE), np.linspace(0.9, 1.1, 96).reshape(8, 12)
    out = forward(MOE, weights)[None, "embedding"] * nudge
    moved = dict(DenseReference(MOE, weights.__getitem__).stages(IDS, SEQ, POS, nudge=nudge))
    np.testing.assert_array_equal(moved[None, "embedding"], out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS + 20}, r"`token_ids\[0\]` must lie in 0..22 \(`vocab_size`\), got 23"),
        ({"ids": IDS.astype(float)}, "`token_ids` must be a one-dimensional integer array, got float64"),
        ({"pos": POS[:3]}, "`pos` must have one entry per token, got 3 for 8"),
        ({"pos": POS - 1}, "`pos` must be >= 0, got -1"),
        ({"ids": IDS[:0], "seq": SEQ[:0], "pos": POS[:0]}, "`token_ids` is empty"),
        ({"routing": {0: np.zeros((8, 2), int)}}, r"`routing\[0\]` names an expert twice"),
        ({"routing": {0: np.tile([0, 1], (8, 1))}}, "`routing` has no entry for layer 1"),
        ({"routing": {0: np.tile([0, 5], (8, 1))}}, r"`routing\[0\]` must name experts 0..4, got 0..5"),
        ({"routing": {0: np.zeros((8, 3), int)}}, r"`routing\[0\]` must hold integers of shape \(8, 2\)"),
        ({"dtype": np.float16}, "must be float64 or float32, got float16"),
    ],
)
def test_bad_requests_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        forward(MOE, random_weights(MOE), **change)


def test_routing_of_a_dense_model_and_a_nudge_of_another_shape_are_refused():
    with pytest.raises(InputError, match="the model is dense"):
        forward(DENSE, random_weights(DENSE), routing={0: np.zeros((8, 2), int)})
    with pytest.raises(InputError, match=r"`nudge` must have shape \(8, 12\), got \(8, 1\)"):
        DenseReference(MOE, random_weights(MOE).__getitem__).stages(IDS, SEQ, POS, nudge=np.ones((8, 1)))


def test_tensors_of_another_shape_or_kind_are_refused_by_name():
    weights = random_weights(MOE)
    weights["model.layers.1.self_attn.o_proj.weight"] = np.zeros((12, 12), np.float32)
    with pytest.raises(CheckpointError, match=r"`model.layers.1.self_attn.o_proj.weight` must have shape \(12, 24\), got \(12, 12\)"):
        forward(MOE, weights)
    weights["model.layers.1.self_attn.o_proj.weight"] = np.zeros((12, 24), np.int8)
    with pytest.raises(CheckpointError, match="must be read as real floating values, got int8"):
        forward(MOE, weights)


def test_denominator_is_summed_key_by_key():
    rng = np.random.default_rng(0)
    q, k = (0.01 * rng.standard_normal((n, 1, 4)).astype(np.float32) for n in (1, 3000))
    maximum, denominator, _ = formulas.attention(q, k, k, np.ones((1, 3000), np.bool_), 0.5)
    p = np.exp((q[:, 0] @ k[:, 0].T / np.sqrt(np.float32(4)))[0] - maximum[0, 0])
    total = np.float32(0)
    for term in p:
        total += term
    assert denominator[0, 0] == total
    assert total != p.sum()


@pytest.mark.parametrize("interleaved", [False, True])
def test_part_of_a_head_is_rotated_as_complex_numbers(interleaved):
    rng = np.random.default_rng(1)
    x, angles = rng.standard_normal((3, 2, 10)), rng.standard_normal((3, 3))
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    expected = x.copy()
    for u, (i, j) in enumerate(pairs):
        z = (x[..., i] + 1j * x[..., j]) * np.exp(1j * angles[:, u])[:, None]
        expected[..., i], expected[..., j] = z.real, z.imag
    np.testing.assert_allclose(formulas.rotate(x, angles, interleaved=interleaved), expected, rtol=1e-12)
