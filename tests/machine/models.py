"""Small models and grids for the tests of the machine as a whole."""

from __future__ import annotations

from typing import Any

import wse_emu as wse

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 150, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "num_local_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": None,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 131, "hidden_size": 22, "intermediate_size": 26, "moe_intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "mlp_only_layers": [1],
    "use_sliding_window": True, "sliding_window": 5, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {"mixtral": MIXTRAL, "llama": LLAMA, "qwen3_moe": QWEN3_MOE}


def make_model(
    family: str, rows: int, cols: int, executor: str = "batched", *, changes: dict[str, Any] | None = None, **options: Any
) -> wse.WaferModel:  # fmt: skip
    """The same random model on any grid and executor."""
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=executor)
    return wse.from_config(CONFIGS[family] | (changes or {}), seed=3, wafer=wafer, **options)
