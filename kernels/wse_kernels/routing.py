"""Routing rules: which experts a token visits and with which weight, on the core where its scores meet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import kernel
from wse_kernels.exp import exp32

_ZERO = np.float32(0.0)


@kernel()
def softmax_topk(
    logits: NDArray[np.float32],
    renormalize: bool,
    probs: NDArray[np.float32],
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
) -> None:
    """Softmax over experts, then the `top_k` most probable, ties to the lowest id.

    The maximum is exact; the denominator is summed over ascending expert ids; the chosen weights, if renormalised, are divided by their sum
    over ascending slots. The chosen experts are always distinct: where scores are not finite the weights are NaN, and the lowest ids are
    taken.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        Scores.
    renormalize : bool
        Divide the chosen probabilities by their sum.
    probs : ndarray, (t, n_experts), float32
        Scratch: probabilities; a chosen one is set to -1.
    topk_ids : ndarray, (t, top_k), int64
        Written: experts in descending order of probability.
    topk_weights : ndarray, (t, top_k), float32
        Written.

    References
    ----------
    Jiang et al., "Mixtral of Experts", 2024, section 2.1.
    """
    n_experts = logits.shape[1]
    for i in range(logits.shape[0]):
        top = logits[i, 0]
        for e in range(1, n_experts):
            if logits[i, e] > top:
                top = logits[i, e]
        denominator = _ZERO
        for e in range(n_experts):
            probs[i, e] = exp32(logits[i, e] - top)
            denominator = denominator + probs[i, e]
        for e in range(n_experts):
            probs[i, e] = probs[i, e] / denominator
        total = _ZERO
        for slot in range(topk_ids.shape[1]):
            best = 0
            for e in range(1, n_experts):
                if probs[i, e] > probs[i, best] or probs[i, best] < _ZERO:
                    best = e
            topk_ids[i, slot] = best
            topk_weights[i, slot] = probs[i, best]
            total = total + probs[i, best]
            probs[i, best] = np.float32(-1.0)
        if renormalize:
            for slot in range(topk_ids.shape[1]):
                topk_weights[i, slot] = topk_weights[i, slot] / total


@kernel()
def select_expert(
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
    expert: int,
    rows: NDArray[np.int64],
    scale: NDArray[np.float32],
    n_rows: NDArray[np.int64],
) -> None:
    """List this core's tokens that chose `expert`, ascending, with their weights.

    Parameters
    ----------
    topk_ids, topk_weights : ndarray, (t, top_k), int64 and float32
    expert : int
    rows, scale : ndarray, (t,), int64 and float32
        Written up to ``n_rows[0]``; the rest is set to 0.
    n_rows : ndarray, (1,), int64
        Written: number of tokens.
    """
    n = 0
    for i in range(topk_ids.shape[0]):
        rows[i] = 0
        scale[i] = _ZERO
        for slot in range(topk_ids.shape[1]):
            if topk_ids[i, slot] == expert:
                rows[n] = i
                scale[n] = topk_weights[i, slot]
                n += 1
    n_rows[0] = n


@kernel()
def group_tokens(
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    scale: NDArray[np.float32],
) -> None:
    """Lists of tokens of all experts at once, each ascending: `select_expert` for every expert of a whole mesh.

    Parameters
    ----------
    topk_ids, topk_weights : ndarray, (t, top_k), int64 and float32
    starts : ndarray, (n_experts + 1,), int64
        Written: the list of expert ``e`` is ``rows[starts[e] : starts[e + 1]]``.
    rows, scale : ndarray, (t * top_k,), int64 and float32
        Written.
    """
    starts[:] = 0
    for i in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            starts[topk_ids[i, slot] + 1] += 1
    for e in range(1, starts.shape[0]):
        starts[e] += starts[e - 1]
    for i in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            e = topk_ids[i, slot]
            rows[starts[e]] = i
            scale[starts[e]] = topk_weights[i, slot]
            starts[e] += 1
    for e in range(starts.shape[0] - 1, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@kernel()
def mark_chosen(topk_ids: NDArray[np.int64], mask: NDArray[np.int32]) -> None:
    """Bit set of the experts that this core's tokens chose: bit ``e % 32`` of word ``e // 32``.

    Parameters
    ----------
    topk_ids : ndarray, (t, top_k), int64
    mask : ndarray, (ceil(n_experts / 32),), int32
        Written.
    """
    mask[:] = np.int32(0)
    for i in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            e = topk_ids[i, slot]
            mask[e // 32] |= np.int32(np.uint32(1) << np.uint32(e % 32))


@kernel()
def merge_bits(mask: NDArray[np.int32], other: NDArray[np.int32]) -> None:
    """``mask |= other``, both (n,) int32."""
    for i in range(mask.shape[0]):
        mask[i] |= other[i]
