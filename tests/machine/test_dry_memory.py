"""A plan costs the host what its numbers weigh, not what the values would."""

from __future__ import annotations

import tracemalloc

from wse_emu.checkpoint import parse_config
from wse_emu.engine.plan import plan_model


def test_a_plan_holds_no_logits() -> None:
    spec = parse_config(
        {
            "model_type": "llama", "vocab_size": 100_000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        }
    )  # fmt: skip
    logits_bytes = 1000 * spec.vocab_size * 4
    tracemalloc.start()
    try:
        assert plan_model(spec, rows=20, cols=40, prompt_tokens=1000, new_tokens=0).fits
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < logits_bytes / 8, f"{peak:,} bytes for a plan whose logits would be {logits_bytes:,}"
