"""One small model for the tests of rough treatment, and what a run of it leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import wse_emu as wse

CONFIG: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 50, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "num_local_experts": 3, "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
PROMPT, NEW = np.array([5, 9, 2]), 3


def make_model(executor: Any = "batched", seed: int = 3, **options: Any) -> wse.WaferModel:
    """The same model for the same seed, on a wafer of its own."""
    return wse.from_config(CONFIG, seed=seed, wafer=wse.Wafer(wse.WSE3, rows=2, cols=2, executor=executor), **options)


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays are the same bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def what_is_there(wafer: wse.Wafer) -> tuple[Any, ...]:
    """What lies on a wafer: tensors, bytes of the fullest core, blocks of every arena; and the ledger's scope."""
    blocks = ()
    if wafer.cores is not None:
        blocks = tuple(tuple(b.name for b in wafer.cores.arena(*core).blocks) for core in np.ndindex(wafer.rows, wafer.cols))
    return wafer.sram.live, wafer.sram.used_bytes(), blocks, wafer.ledger.current_scope
