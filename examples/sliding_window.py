"""Sliding-window against full attention: the same model and prompt, and what the ledger says of the attention.

Nothing is computed with keys outside of the window, and queries do not visit the rows of cores that hold only such keys. Keys and values
that no later query can see are given up: the cache keeps as many tokens as the window.

    python examples/sliding_window.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

import wse_emu as wse
from wse_emu.wafer.ledger import FABRIC_KINDS

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def attention(window: int | None, prompt: np.ndarray, rows: int, cols: int) -> dict[str, Any]:
    """What attention did in a forward pass over `prompt`, and whether the pass agrees with the float64 reference."""
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols)
    model = wse.from_config({**CONFIG, "sliding_window": window}, seed=0, wafer=wafer)
    logits = model(prompt).logits
    of_attention = [row for row in wafer.ledger.totals() if row["stage"] == "attention"]
    assert model.recorded_kv is not None
    return {
        "logits": logits,
        "macs": sum(row["macs"] for row in of_attention),
        "moved": sum(row["bytes"] for row in of_attention if row["kind"] in FABRIC_KINDS),
        "kept": int(model.recorded_kv[0].sum()),
        "verified": model.verify(prompt).passed,
    }


def main(rows: int = 8, cols: int = 4, n_tokens: int = 96, window: int = 16) -> None:
    """Compare a windowed and a full model with the same weights."""
    prompt = np.random.default_rng(0).integers(CONFIG["vocab_size"], size=(1, n_tokens))
    full, windowed = (attention(w, prompt, rows, cols) for w in (None, window))
    for name, found in (("full", full), (f"window {window}", windowed)):
        print(
            f"{name:10} {found['macs']:10,} multiply-adds {found['moved']:10,} bytes between cores, "
            f"{found['kept']} tokens kept, verified {found['verified']}"
        )
    same = np.array_equal(full["logits"][:, :window], windowed["logits"][:, :window])
    print(f"tokens that see all keys in both have the same logits, bit for bit: {same}")


if __name__ == "__main__":
    main()
