"""Routing research: which experts a run chose, and what the same choices would stream and move on a whole wafer.

A small mixture of experts generates on a few cores; its routing is recorded. The ``dry`` executor, which moves shapes and counts only,
then replays that routing on all cores of a WSE-3 that programs may use, again with every expert streamed whether a token chose it or not,
and last with tokens that choose as many different experts as they can.

    python examples/routing_research.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import wse_emu as wse
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.reports import Run
from wse_emu.wafer.ledger import FABRIC_KINDS

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}


def replay(prompt: np.ndarray, new_tokens: int, routing: Sequence[RoutingTrace] | None, **options: Any) -> tuple[int, int]:
    """Bytes of weights streamed and bytes moved between cores, on all usable cores of a WSE-3; without `routing`, of the worst case."""
    wafer = wse.Wafer(wse.WSE3, executor="dry")
    model = wse.from_config(CONFIG, wafer=wafer, **options)
    model.generate(prompt, max_new_tokens=new_tokens, routing=routing)
    run = Run.of(model)
    return run.total("bytes", "stream"), run.total("bytes", *FABRIC_KINDS)


def main(rows: int = 4, cols: int = 4, n_tokens: int = 6, max_new_tokens: int = 4) -> None:
    """Print the load of the experts of every layer, then what moved, measured and replayed."""
    prompt = np.random.default_rng(0).integers(CONFIG["vocab_size"], size=(1, n_tokens))
    model = wse.from_config(CONFIG, seed=0, wafer=wse.Wafer(wse.WSE3, rows=rows, cols=cols))
    model.generate(prompt, max_new_tokens=max_new_tokens)
    run, trace = Run.of(model), model.recorded_routing
    for layer, load in enumerate(run.experts):
        print(f"layer {layer}: expert chosen {load.by_expert.tolist()} times, max/mean {load.expert_ratio:.2f}, rows {load.row_ratio:.2f}")

    print(f"{'':32} {'streamed':>14} {'between cores':>14}")
    measured = run.total("bytes", "stream"), run.total("bytes", *FABRIC_KINDS)
    lines = {
        f"measured, {rows} x {cols} cores": measured,
        "replayed on the whole wafer": replay(prompt, max_new_tokens, trace),
        "the same, every expert streamed": replay(prompt, max_new_tokens, trace, stream_experts="all"),
        "worst case of the routing": replay(prompt, max_new_tokens, None),
    }
    for what, (streamed, moved) in lines.items():
        print(f"{what:32} {streamed:14,} {moved:14,} bytes")


if __name__ == "__main__":
    main()
