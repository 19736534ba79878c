"""Small runs that the tests of the reports look at."""

from __future__ import annotations

from typing import Any

import numpy as np

import wse_emu as wse

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 96, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "num_local_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": None,
    "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {"mixtral": MIXTRAL, "llama": LLAMA}


def make_model(family: str = "mixtral", rows: int = 3, cols: int = 2, executor: str = "batched", **options: Any) -> wse.WaferModel:
    """The same random model on any grid and executor."""
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor=executor)
    return wse.from_config(CONFIGS[family], seed=3, wafer=wafer, **options)


def prompts(batch: int, n: int, vocab: int = 60) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids, (batch, n)."""
    return np.random.default_rng(7).integers(0, vocab, (batch, n))
