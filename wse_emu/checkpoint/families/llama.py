"""Llama, which every other family is a change of, and its nearest kin."""

from __future__ import annotations

from wse_emu.checkpoint.family import Family, MoeRules
from wse_emu.checkpoint.naming import ffn_names, named
from wse_emu.checkpoint.routers import fixed_routing, fixed_routing_config
from wse_emu.checkpoint.windows import every_layer, full, no_window, plain_window
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING

LLAMA = Family(
    model_type="llama", architecture="LlamaForCausalLM", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    attention_bias=Biases(qkv=True, out=True), windows=full, window_config=no_window,
)  # fmt: skip


MISTRAL = Family(
    model_type="mistral", architecture="MistralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, bos_token_id=1,
    eos_token_id=2, windows=every_layer(4096), window_config=plain_window,
)  # fmt: skip


MIXTRAL = Family(
    model_type="mixtral", architecture="MixtralForCausalLM", num_kv_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
    rope_theta=1e6, bos_token_id=1, eos_token_id=2, windows=every_layer(None), window_config=plain_window,
    moe=MoeRules(
        count="num_local_experts", default_num_experts=8, default_top_k=2, width="intermediate_size",
        routing=fixed_routing(MIXTRAL_ROUTING), routing_config=fixed_routing_config,
    ),
    names=named(
        router="block_sparse_moe.gate.weight", router_bias="block_sparse_moe.gate.bias",
        e_score_correction_bias="block_sparse_moe.gate.e_score_correction_bias",
        **ffn_names("experts.", "block_sparse_moe.experts.{e}.", gate="w1", up="w3", down="w2"),
    ),
)  # fmt: skip
