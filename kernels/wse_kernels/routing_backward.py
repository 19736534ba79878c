"""Backward forms of the routing rules: from gradients of experts' weights, and of scores, to gradients of the router's logits.

The choice of experts has no gradient, and so neither has what serves the choice alone: the correction bias, groups, scores that differ
from those that weigh, sinkhorn's rounds, room that is full. Rounding to 16 bits passes gradients on as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.exp import exp32, sigmoid32
from wse_kernels.fma import fma_uncounted as fma
from wse_kernels.log import softplus32
from wse_kernels.routing import (
    LOGITS,
    NOBODY,
    SIGMOID,
    SINKHORN,
    SOFTMAX,
    SOFTMAX_TOPK,
    SPARSEMIXER,
    SQRTSOFTPLUS,
    RouterCode,
    expert_scores,
    raw_weights,
    stored,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)

BACKWARD_ROWS = 6
"""Rows of scratch: logits as used, scores, gradients of scores, whether left out, chosen weights, their gradients."""
UNCOUNTED = -1
"""In the place of a token's sequence: one that no loss counts."""


@helper
def _scores_backward(logits: NDArray[np.float32], kind: int, d_scores: NDArray[np.float32], scores: NDArray[np.float32],
    d_logits: NDArray[np.float32]) -> None:  # fmt: skip
    """Add one token's gradient through `expert_scores` to `d_logits`; all (n_experts,); `scores` is scratch."""
    n_experts = logits.shape[0]
    if kind == SOFTMAX:
        expert_scores(logits, kind, scores)
        mean = _ZERO
        for e in range(n_experts):
            mean = fma(scores[e], d_scores[e], mean)
        for e in range(n_experts):
            d_logits[e] = d_logits[e] + scores[e] * (d_scores[e] - mean)
    elif kind == SIGMOID:
        for e in range(n_experts):
            slope = sigmoid32(logits[e]) * sigmoid32(-logits[e])
            d_logits[e] = d_logits[e] + d_scores[e] * slope
    elif kind == SQRTSOFTPLUS:
        for e in range(n_experts):
            root = np.sqrt(softplus32(logits[e]))
            # Where the root is lost to underflow, so is its slope, which is half of it.
            slope = root if root == _ZERO else (_HALF * sigmoid32(logits[e])) / root
            d_logits[e] = d_logits[e] + d_scores[e] * slope
    elif kind == LOGITS:
        for e in range(n_experts):
            d_logits[e] = d_logits[e] + d_scores[e]


@helper
def _finish_backward(rule: RouterCode, weights: NDArray[np.float32], d_weights: NDArray[np.float32]) -> None:
    """From gradients of finished weights to gradients of the scores that were divided; `weights`, (slots,), holds those scores."""
    n = weights.shape[0]
    if rule.scale != _ONE:
        for slot in range(n):
            d_weights[slot] = d_weights[slot] * rule.scale
    if rule.normalizes:
        total = _ZERO
        for slot in range(n):
            total = total + weights[slot]
        total = (total + rule.null_bias) + rule.epsilon
        if total < rule.least:
            for slot in range(n):
                d_weights[slot] = d_weights[slot] / rule.least
        else:
            mean = _ZERO
            for slot in range(n):
                mean = fma(weights[slot] / total, d_weights[slot], mean)
            for slot in range(n):
                d_weights[slot] = (d_weights[slot] - mean) / total


@helper
def _raw_backward(
    rule: RouterCode, work: NDArray[np.float32], ids: NDArray[np.int64], weights: NDArray[np.float32], d_weights: NDArray[np.float32],
    d_logits: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add one token's gradient through `raw_weights`, whose result is `weights`, to `d_logits`, (n_experts,)."""
    logits, scores, d_scores, shut = work[0], work[1], work[2], work[3]
    n_experts, n = logits.shape[0], ids.shape[0]
    if rule.weighting == SOFTMAX_TOPK:
        mean = _ZERO
        for slot in range(n):
            mean = fma(weights[slot], d_weights[slot], mean)
        for slot in range(n):
            d_logits[ids[slot]] = weights[slot] * (d_weights[slot] - mean)
    elif rule.weighting == SPARSEMIXER:
        shut[:] = _ZERO
        for slot in range(n):
            best = logits[ids[slot]]
            d = d_weights[slot] * weights[slot]
            for e in range(n_experts):
                size = abs(logits[e])
                size = size if size > best else best
                if shut[e] == _ZERO and not (best - logits[e]) / size > rule.jitter:
                    share = exp32(logits[e] - best) * weights[slot]
                    d_logits[e] = d_logits[e] - d * share
            d_logits[ids[slot]] = d_logits[ids[slot]] + d
            shut[ids[slot]] = _ONE
    else:
        d_scores[:] = _ZERO
        for slot in range(n):
            d_scores[ids[slot]] = d_weights[slot]
        _scores_backward(logits, rule.weighting, d_scores, scores, d_logits)


@kernel()
def route_tokens_backward(
    logits: NDArray[np.float32], topk_ids: NDArray[np.int64], d_weights: NDArray[np.float32], rule: RouterCode, work: NDArray[np.float32],
    d_logits: NDArray[np.float32],
) -> None:  # fmt: skip
    """From the gradient of the experts' weights to that of the logits, token by token: backward of `route_tokens` and `weigh_chosen`.

    The experts are those that were chosen; weights are computed again. Of weights ``w = s / D`` divided by their sum (and what is added to
    it) the scores' gradient is ``(d - sum of w d) / D``, over ascending slots, so that one expert, whose weight is 1 whatever its score,
    sends back exactly 0; where the divisor is at its least value it is ``d / D``. Of softmax it is ``p (d - sum of p d)``, over ascending
    experts. Of sparsemixer it is what its formula at inference gives, the band held as it is.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        With the gate's bias, as `route_tokens` leaves them.
    topk_ids : ndarray, (t, slots), int64
        The decision; `NOBODY` in the last slots of a token that visits fewer experts.
    d_weights : ndarray, (t, slots), float32
        Gradient of the weights; of no account in slots of nobody.
    rule : RouterCode
    work : ndarray, (6, n_experts), float32
        Scratch.
    d_logits : ndarray, (t, n_experts), float32
        Written; also the gradient of a bias of the gate, summed over tokens.

    References
    ----------
    Shazeer et al., "Outrageously large neural networks: the sparsely-gated mixture-of-experts layer", 2017, section 2.1: trained by simple
    back-propagation through the weights of the chosen experts.
    """
    n_experts = logits.shape[1]
    used, scores = work[0], work[1]
    for i in range(logits.shape[0]):
        n = 0
        while n < topk_ids.shape[1] and topk_ids[i, n] != NOBODY:
            n += 1
        for e in range(n_experts):
            d_logits[i, e] = _ZERO
            used[e] = stored(logits[i, e], rule.stored_as) if rule.rounds_logits else logits[i, e]
        if n == 0 or rule.weighting == SINKHORN:  # of which no gradient is taken
            continue
        if rule.weighting == rule.selection:
            expert_scores(used, rule.selection, scores)
            for e in range(n_experts):
                scores[e] = stored(scores[e], rule.stored_as)
        weights, d_chosen = work[4, :n], work[5, :n]
        raw_weights(rule, work, topk_ids[i, :n], weights)
        for slot in range(n):
            d_chosen[slot] = d_weights[i, slot]
        _finish_backward(rule, weights, d_chosen)
        _raw_backward(rule, work, topk_ids[i, :n], weights, d_chosen, d_logits[i])


@kernel()
def count_visits(topk_ids: NDArray[np.int64], sequence: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Add this core's tokens to the counts of a loss that balances experts: how many of a sequence visit each.

    Parameters
    ----------
    topk_ids : ndarray, (t, slots), int64
        `NOBODY` counts nowhere.
    sequence : ndarray, (t,), int64
        Sequence of each token, or `UNCOUNTED`.
    counts : ndarray, (n_sequences, n_experts), int64
        Read and written.
    """
    for i in range(topk_ids.shape[0]):
        if sequence[i] != UNCOUNTED:
            for slot in range(topk_ids.shape[1]):
                if topk_ids[i, slot] != NOBODY:
                    counts[sequence[i], topk_ids[i, slot]] += 1


@kernel()
def add_balance_backward(
    logits: NDArray[np.float32], sequence: NDArray[np.int64], d_scores: NDArray[np.float32], kind: int, rule: RouterCode,
    work: NDArray[np.float32], d_logits: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add the gradient of a loss that is linear in all experts' scores, as one that balances experts is, to that of the logits.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        With the gate's bias.
    sequence : ndarray, (t,), int64
        Sequence of each token, or `UNCOUNTED`.
    d_scores : ndarray, (n_sequences, n_experts), float32
        Gradient of every expert's score, the same for all tokens of a sequence.
    kind : int
        Of the scores: `SOFTMAX`, `SIGMOID`, `SQRTSOFTPLUS` or `LOGITS`.
    rule : RouterCode
        Says whether logits are rounded first.
    work : ndarray, (6, n_experts), float32
        Scratch.
    d_logits : ndarray, (t, n_experts), float32
        Read and written.
    """
    for i in range(logits.shape[0]):
        if sequence[i] == UNCOUNTED:
            continue
        for e in range(logits.shape[1]):
            work[0, e] = stored(logits[i, e], rule.stored_as) if rule.rounds_logits else logits[i, e]
        _scores_backward(work[0], kind, d_scores[sequence[i]], work[1], d_logits[i])
