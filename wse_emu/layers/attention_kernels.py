"""What one core does in attention, as kernels of the wafer."""

from __future__ import annotations

import numpy as np

from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import CHAIN_ADD
from wse_kernels.attention import (
    cap_scores,
    finish,
    pack_queries,
    partial_scores,
    score_max,
    softmax_accumulate,
    start_denominator,
    start_max,
)
from wse_kernels.attention_rounded import softmax_accumulate_rounded

PACK_QUERIES = Kernel(
    body=pack_queries, params=("qkv", "first_slot", "q_slots", "other_slots", "row0", "u0", "q_t"), out=("q_t",), code_bytes=224
)  # fmt: skip
PARTIAL_SCORES = Kernel(
    body=partial_scores,
    params=("k", "f0", "keys", "q_t", "s_t"),
    out=("s_t",),
    code_bytes=416,
    macs=lambda s: s["s_t"][0] * s["s_t"][1] * s["q_t"][0],
)
START_MAX = Kernel(body=start_max, params=("sink", "m"), out=("m",), code_bytes=96)
CAP_SCORES = Kernel(body=cap_scores, params=("s_t", "scale", "cap"), inout=("s_t",), code_bytes=416)
SCORE_MAX = Kernel(body=score_max, params=("s_t", "scale", "q_slots", "admitted", "m"), inout=("s_t", "m"), code_bytes=256)
START_DENOMINATOR = Kernel(body=start_denominator, params=("sink", "m", "denom"), out=("denom",), code_bytes=288)
ACCUMULATE = Kernel(
    body=softmax_accumulate,
    params=("s_t", "q_slots", "keys", "admitted", "m", "v", "f0", "denom", "o_t"),
    inout=("s_t", "denom", "o_t"),
    code_bytes=704,
)
ACCUMULATE_ROUNDED = Kernel(
    body=softmax_accumulate_rounded,
    params=("s_t", "q_slots", "keys", "admitted", "m", "v", "f0", "fmt", "largest", "denom", "o_t"),
    inout=("s_t", "largest", "denom", "o_t"),
    code_bytes=928,
)
"""In the place of `ACCUMULATE` where the state of softmax has 16 bits."""
FINISH = Kernel(body=finish, params=("o_t", "denom", "q_slots", "row0", "u0", "context"), out=("context",), code_bytes=224)

CODE_BYTES = sum(
    k.code_bytes for k in (PACK_QUERIES, PARTIAL_SCORES, START_MAX, SCORE_MAX, START_DENOMINATOR, ACCUMULATE, FINISH, CHAIN_ADD)
)
"""Of all bodies that are on a core together; `CAP_SCORES` comes on top where scores have a cap."""
NO_SINK = np.zeros(0, np.float32)
"""Sinks of heads that have none."""
