"""What one core does for the lightning indexer, as kernels of the wafer."""

from __future__ import annotations

from wse_emu.layers.attention_kernels import PACK_QUERIES, PARTIAL_SCORES
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.moves import CHAIN_ADD
from wse_kernels.index_keys import add_counts, count_reaching, count_wanted, index_scores, order_scores, raise_threshold, take_keys

INDEX_SCORES = Kernel(
    body=index_scores, params=("s_t", "weights", "first_head", "scale", "weight_scale", "scores"), inout=("scores",), code_bytes=320,
    macs=lambda s: s["s_t"][0] * s["s_t"][1],
)  # fmt: skip
ORDER_SCORES = Kernel(body=order_scores, params=("scores", "admitted", "order"), out=("order",), code_bytes=128)
COUNT_REACHING = Kernel(body=count_reaching, params=("order", "threshold", "step", "counts"), out=("counts",), code_bytes=160)
ADD_COUNTS = Kernel(body=add_counts, params=("acc", "p"), inout=("acc",), code_bytes=96)
RAISE_THRESHOLD = Kernel(
    body=raise_threshold, params=("counts", "step", "first", "topk", "threshold"), inout=("threshold",), code_bytes=160
)  # fmt: skip
COUNT_WANTED = Kernel(body=count_wanted, params=("counts", "first", "topk", "wanted"), out=("wanted",), code_bytes=128)
TAKE_KEYS = Kernel(
    body=take_keys, params=("order", "threshold", "before", "wanted", "taken"), inout=("before",), out=("taken",), code_bytes=224
)  # fmt: skip

CODE_BYTES = sum(
    kernel.code_bytes
    for kernel in (
        PACK_QUERIES, PARTIAL_SCORES, CHAIN_ADD, INDEX_SCORES, ORDER_SCORES, COUNT_REACHING, ADD_COUNTS, RAISE_THRESHOLD, COUNT_WANTED,
        TAKE_KEYS,
    )
)  # fmt: skip
"""Of all bodies that are on a core together."""
