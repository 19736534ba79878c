"""What `save` writes, read by transformers: every tensor there, none left over, equal values, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.checkpoint import TensorSource, published_names
from wse_emu.foundation.model_spec import ModelSpec

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROUNDED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits, in their standard deviations."""
BASE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 1e4, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 5},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3": {**BASE, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {
        **BASE, "model_type": "qwen3_moe", "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1],
        "norm_topk_prob": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen2_moe": {
        **BASE, "model_type": "qwen2_moe", "hidden_size": 32, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10,
        "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1], "norm_topk_prob": True,
    },
    "olmoe": {
        **BASE, "model_type": "olmoe", "hidden_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 1.5,
        "attention_bias": True,
    },
    "granitemoe": {
        **BASE, "model_type": "granitemoe", "hidden_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 3.0,
    },
    "gemma2": {
        **BASE, "model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 9, "final_logit_softcapping": 9.0,
        "attn_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **BASE, "model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2, "rope_local_base_freq": 20.0,
        "tie_word_embeddings": False,
    },
    "dots1": {
        **BASE, "model_type": "dots1", "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "sliding_window": 5, "max_window_layers": 2,
    },
    "glm4_moe": {
        **BASE, "model_type": "glm4_moe", "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "first_k_dense_replace": 2, "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.75,
    },
    "hunyuan_v1_moe": {
        **BASE, "model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": 2, "rope_scaling": {"type": "dynamic", "alpha": 9.0},
    },
    "ernie4_5_moe": {
        **BASE, "model_type": "ernie4_5_moe", "hidden_size": 32, "moe_intermediate_size": 12, "moe_num_experts": 6, "moe_k": 3,
        "moe_layer_end_index": 1, "tie_word_embeddings": False,
    },
    "phimoe": {
        **BASE, "model_type": "phimoe", "num_local_experts": 4, "router_jitter_noise": 0.1, "attention_bias": True, "lm_head_bias": True,
    },
    "deepseek_v2": {
        **BASE, "model_type": "deepseek_v2", "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": None, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8, "v_head_dim": 4, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **BASE, "model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 7, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8, "v_head_dim": 4, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5,
        },
    },
    "deepseek_v32": {
        **BASE, "model_type": "deepseek_v32", "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 7, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8, "v_head_dim": 4, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "index_topk": 5, "index_head_dim": 12,
        "index_n_heads": 9,
    },
    "glm_moe_dsa": {
        **BASE, "model_type": "glm_moe_dsa", "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 7, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8, "v_head_dim": 4, "moe_intermediate_size": 12, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "index_topk": 5, "index_head_dim": 8, "index_n_heads": 9,
        "indexer_types": ["full", "shared", "full"],
    },
    "llama4_text": {
        **BASE, "model_type": "llama4_text", "intermediate_size": 12, "intermediate_size_mlp": 28, "num_local_experts": 4,
        "num_experts_per_tok": 1, "moe_layers": [0, 2], "no_rope_layers": [1, 0, 1], "attention_chunk_size": 5, "floor_scale": 4,
    },
    "dbrx": {
        "model_type": "dbrx", "vocab_size": 131, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500.0},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gpt_oss": {**BASE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "minimax_m2": {**BASE, "model_type": "minimax_m2", "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
}  # fmt: skip


def expected_parameters(spec: ModelSpec, tensors: TensorSource, dtype: str) -> dict[str, NDArray[np.float32]]:
    """By transformers' names: experts of a layer are fused to one array each of gate and up, and of down."""

    def read(name: str) -> NDArray[np.float32]:
        return tensors.read(name).astype(ROUNDED[dtype]).astype(np.float32)

    out: dict[str, NDArray[np.float32]] = {}
    for role, tensor in published_names(spec).items():
        if ".experts." not in role:
            own = tensor.name if spec.family in ("granitemoe", "dbrx") else tensor.name.replace("block_sparse_moe", "mlp")
            if spec.family != "dbrx":
                own = own.replace(".router.layer.", ".router.").replace("mlp.moe_statics.", "mlp.gate.moe_statics.")
            own = own.replace(".gate.", ".router.") if spec.family == "phimoe" else own
            out[own] = read(tensor.name)
    if spec.family in ("gpt_oss", "dbrx", "llama4_text"):  # published as it is kept
        names = {t.name for role, t in published_names(spec).items() if ".experts." in role}
        return out | {name: read(name) for name in names}
    if spec.family == "granitemoe":  # published as it is kept
        for layer in spec.moe_layers:
            block = f"model.layers.{layer}.block_sparse_moe."
            for published, own in (("input_linear.weight", "experts.gate_up_proj"), ("output_linear.weight", "experts.down_proj")):
                out[block + own] = read(block + published)
        return out
    for layer in spec.moe_layers:
        names = {role: t.name for role, t in published_names(spec).items() if role.startswith(f"layers.{layer}.experts.")}
        experts = [[read(names[f"layers.{layer}.experts.{e}.{w}"]) for w in ("w_gate", "w_up", "w_down")] for e in range(spec.num_experts)]
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in experts])
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack([down for _, _, down in experts])
    return out


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_transformers_reads_equal_values(family: str, dtype: Any, max_shard_bytes: int, tmp_path: Path) -> None:
    model = wse.from_config(CONFIGS[family], seed=1)
    directory = model.save(tmp_path / "m", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert len(list(directory.glob("*.safetensors"))) == 1 or max_shard_bytes == 20_000
    assert str(transformers.AutoConfig.from_pretrained(directory).dtype) == f"torch.{dtype}"
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = expected_parameters(model.spec, model.checkpoint.tensors, dtype)
    corrections = [(name, b) for name, b in peer.named_buffers() if name.endswith("e_score_correction_bias")]
    found = {name: p.detach().numpy() for name, p in [*peer.named_parameters(), *corrections]}
    assert sorted(found) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_both_compute_the_same_from_it(family: str, tmp_path: Path) -> None:
    directory = wse.from_config(CONFIGS[family], seed=1).save(tmp_path / "m", dtype="bfloat16")
    ours = wse.from_pretrained(directory, wafer=wse.Wafer(wse.WSE3, rows=4, cols=5), cache_dir=tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 131, (1, 17))
    with torch.inference_mode():
        expected = peer(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours(ids).logits - expected).max() <= LOGIT_TOLERANCE * expected.std()
