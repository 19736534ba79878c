"""A mixture of experts with random weights on a small grid: forward, generate, verify, and what moved where.

python examples/quickstart.py
"""

from __future__ import annotations

import numpy as np

import wse_emu as wse

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def main(rows: int = 4, cols: int = 4, n_tokens: int = 9, max_new_tokens: int = 6) -> None:
    """Run everything once and print what came out."""
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols)
    model = wse.from_config(CONFIG, seed=0, wafer=wafer)
    prompt = np.random.default_rng(0).integers(CONFIG["vocab_size"], size=(1, n_tokens))

    out = model(prompt, output_router_logits=True)
    print("logits          ", out.logits.shape, out.logits.dtype)
    print("experts of the last token, by layer:", [ids[0, -1].tolist() for ids in out.topk_ids])

    ids = model.generate(prompt, max_new_tokens=max_new_tokens)
    print("greedy          ", ids[0, n_tokens:].tolist())
    sampled = model.generate(prompt, max_new_tokens=max_new_tokens, sampler=wse.Sampler(temperature=0.8, top_p=0.9, seed=1))
    print("sampled         ", sampled[0, n_tokens:].tolist())

    report = model.verify(prompt)
    print("verified        ", report.passed)

    for row in wafer.ledger.totals(by=("kind",)):
        what = "runs" if row["kind"] == "launch" else "messages"
        print(f"{row['kind']:12} {row['count']:9,} {what:8} {row['macs']:11,} multiply-adds {row['bytes']:11,} bytes")


if __name__ == "__main__":
    main()
