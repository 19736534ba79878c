"""Routing rules under which the tokens of a sequence meet: sinkhorn scores, experts of limited capacity, experts that choose their tokens.

The tokens of a sequence lie on several cores, earlier ones on earlier cores. What they have in common (a maximum, a sum, how full every
expert is) is a row of numbers, one for each expert, that is handed from core to core; each core takes its own tokens into account, in
ascending order, so that no result depends on where the sequence is cut. Every kernel here is one core's share of one step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.bits import bits_of_f32
from wse_kernels.exp import exp32
from wse_kernels.log import log32
from wse_kernels.routing import (
    NOBODY,
    REJECT,
    SINKHORN,
    TIED,
    RouterCode,
    best_of,
    expert_scores,
    finish_weights,
    is_tied,
    raw_weights,
    shut_groups,
    stored,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_SIGN = np.int64(1 << 31)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
_SHIFT = np.int32(31)
_DONE = np.int8(1)
_OPEN = np.int8(0)


@kernel()
def score_tokens(
    logits: NDArray[np.float32], bias: NDArray[np.float32], correction: NDArray[np.float32], rule: RouterCode, scores: NDArray[np.float32]
) -> None:
    """Scores for the choice, token by token; for sinkhorn, the logits that its rounds begin with.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        Products with the gate; the gate's bias, if there is one, is added in place.
    bias, correction : ndarray, (1, n_experts), float32
        Of the gate, and added to scores; not read where the rule has none.
    rule : RouterCode
    scores : ndarray, (t, n_experts), float32
        Written.
    """
    for i in range(logits.shape[0]):
        for e in range(logits.shape[1]):
            if rule.has_bias:
                logits[i, e] = logits[i, e] + bias[0, e]
            scores[i, e] = stored(logits[i, e], rule.stored_as) if rule.rounds_logits else logits[i, e]
        if rule.selection != SINKHORN:
            expert_scores(scores[i], rule.selection, scores[i])
            _as_compared(scores[i], correction, rule)


@helper
def _as_compared(scores: NDArray[np.float32], correction: NDArray[np.float32], rule: RouterCode) -> None:
    """Round one token's scores as the rule says and add the correction."""
    for e in range(scores.shape[0]):
        scores[e] = stored(scores[e], rule.stored_as)
        if rule.has_correction:
            scores[e] = scores[e] + correction[0, e]


@kernel()
def sinkhorn_over_experts(scores: NDArray[np.float32]) -> None:
    """``r -= log(sum over experts of exp(r))``: exact maximum first, then exponentials summed over ascending ids.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
        Read and written.
    """
    for i in range(scores.shape[0]):
        top = scores[i, 0]
        for e in range(1, scores.shape[1]):
            if scores[i, e] > top:
                top = scores[i, e]
        total = _ZERO
        for e in range(scores.shape[1]):
            total = total + exp32(scores[i, e] - top)
        whole = top + log32(total)
        for e in range(scores.shape[1]):
            scores[i, e] = scores[i, e] - whole


@kernel()
def sinkhorn_maximum(scores: NDArray[np.float32], top: NDArray[np.float32]) -> None:
    """Raise every expert's maximum by this core's tokens.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    top : ndarray, (n_experts,), float32
        Read and written; the first core's begins with -inf.
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            if scores[i, e] > top[e]:
                top[e] = scores[i, e]


@kernel()
def sinkhorn_sum(scores: NDArray[np.float32], top: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    """Add this core's ``exp(r - maximum)`` to every expert's sum, over ascending tokens.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    top : ndarray, (n_experts,), float32
        Maxima over all tokens.
    total : ndarray, (n_experts,), float32
        Read and written; the first core's begins with 0.
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            total[e] = total[e] + exp32(scores[i, e] - top[e])


@kernel()
def sinkhorn_over_tokens(scores: NDArray[np.float32], top: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    """``r -= maximum + log(sum)``, the log-sum over tokens.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
        Read and written.
    top, total : ndarray, (n_experts,), float32
        Over all tokens.
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            scores[i, e] = scores[i, e] - (top[e] + log32(total[e]))


@kernel()
def sinkhorn_end(scores: NDArray[np.float32], correction: NDArray[np.float32], rule: RouterCode) -> None:
    """Scores for the choice from the end of sinkhorn's rounds: exp, rounded as the rule says, plus the correction.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
        Read and written.
    correction : ndarray, (1, n_experts), float32
        Not read where the rule has none.
    rule : RouterCode
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            scores[i, e] = exp32(scores[i, e])
        _as_compared(scores[i], correction, rule)


@helper
def _open_experts(scores: NDArray[np.float32], rule: RouterCode, work: NDArray[np.float32]) -> bool:
    """Mark in ``work[3]`` the experts that are shut to a token; whether a tie of groups decided."""
    for e in range(scores.shape[0]):
        work[2, e] = scores[e]
        work[3, e] = _ZERO
    tied = False
    if rule.topk_group < rule.n_group:
        tied = shut_groups(rule, work)
    return tied


@kernel()
def choose_by_scores(scores: NDArray[np.float32], rule: RouterCode, work: NDArray[np.float32], topk_ids: NDArray[np.int64]) -> None:
    """The highest experts of every token, as `wse_kernels.routing.route_tokens` takes them.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    rule : RouterCode
    work : ndarray, (5, n_experts), float32
        Scratch.
    topk_ids : ndarray, (t, top_k), int64
        Written.
    """
    for i in range(scores.shape[0]):
        tied = _open_experts(scores[i], rule, work)
        last = _ZERO
        for slot in range(topk_ids.shape[1]):
            best = best_of(work[2], work[3], scores.shape[1], rule.tie)
            topk_ids[i, slot] = best
            last = work[2, best]
            work[3, best] = _ONE
        if rule.tie == REJECT and (tied or is_tied(work[2], work[3], scores.shape[1], last)):
            topk_ids[i, 0] = TIED


@kernel()
def open_to_tokens(
    scores: NDArray[np.float32], rule: RouterCode, work: NDArray[np.float32], tried: NDArray[np.int8], topk_ids: NDArray[np.int64]
) -> None:
    """Before the first round of `take_room`: no token has an expert, and only experts of shut groups count as tried.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    rule : RouterCode
    work : ndarray, (5, n_experts), float32
        Scratch.
    tried : ndarray, (t, n_experts), int8
        Written.
    topk_ids : ndarray, (t, top_k), int64
        Written: `NOBODY`.
    """
    for i in range(scores.shape[0]):
        _open_experts(scores[i], rule, work)
        for e in range(scores.shape[1]):
            tried[i, e] = _OPEN if work[3, e] == _ZERO else _DONE
        for slot in range(topk_ids.shape[1]):
            topk_ids[i, slot] = NOBODY


@kernel()
def take_room(
    scores: NDArray[np.float32], rule: RouterCode, capacity: int, work: NDArray[np.float32], tried: NDArray[np.int8],
    topk_ids: NDArray[np.int64], taken: NDArray[np.int64],
) -> None:  # fmt: skip
    """One round: every token that has a free slot tries the best expert that it has not tried, and gets it if there is room.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    rule : RouterCode
    capacity : int
        Most tokens of an expert.
    work : ndarray, (5, n_experts), float32
        Scratch.
    tried : ndarray, (t, n_experts), int8
        Read and written.
    topk_ids : ndarray, (t, top_k), int64
        Read and written: experts in the order in which they were got, then `NOBODY`.
    taken : ndarray, (n_experts,), int64
        Read and written: tokens of every expert so far.
    """
    n_experts, top_k = scores.shape[1], topk_ids.shape[1]
    for i in range(scores.shape[0]):
        if topk_ids[i, top_k - 1] != NOBODY:
            continue
        for e in range(n_experts):
            work[3, e] = _ZERO if tried[i, e] == _OPEN else _ONE
        best = best_of(scores[i], work[3], n_experts, rule.tie)
        if best < 0:
            continue
        tried[i, best] = _DONE
        if taken[best] < capacity:
            taken[best] += 1
            slot = 0
            while topk_ids[i, slot] != NOBODY:
                slot += 1
            topk_ids[i, slot] = best


@helper
def _key(x: np.float32) -> np.int64:
    """An integer of 32 bits, 0 or more, that orders float32 numbers; both zeros alike, what is no number lowest."""
    if x != x:
        return np.int64(0)
    bits = bits_of_f32(x + _ZERO)
    return np.int64(bits ^ ((bits >> _SHIFT) & _ALL_BUT_SIGN)) + _SIGN


@kernel()
def count_reaching(scores: NDArray[np.float32], bound: NDArray[np.int64], bit: int, reaching: NDArray[np.int64]) -> None:
    """Add this core's tokens whose key for an expert is at least the expert's bound with one more bit set.

    Keys are integers of 32 bits that order scores; the bound is their k-th highest, found bit by bit.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    bound : ndarray, (n_experts,), int64
        The bits found so far.
    bit : int
    reaching : ndarray, (n_experts,), int64
        Read and written.
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            if _key(scores[i, e]) >= bound[e] + (np.int64(1) << bit):
                reaching[e] += 1


@kernel()
def settle_bit(reaching: NDArray[np.int64], bit: int, capacity: int, bound: NDArray[np.int64]) -> None:
    """Set a bit of every expert's bound if enough tokens reach it.

    Parameters
    ----------
    reaching : ndarray, (n_experts,), int64
        Tokens of all cores that do.
    bit : int
    capacity : int
        Tokens that an expert takes; not more than there are.
    bound : ndarray, (n_experts,), int64
        Read and written.
    """
    for e in range(bound.shape[0]):
        if reaching[e] >= capacity:
            bound[e] += np.int64(1) << bit


@kernel()
def count_above(scores: NDArray[np.float32], bound: NDArray[np.int64], above: NDArray[np.int64]) -> None:
    """Add this core's tokens whose key lies above an expert's bound.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    bound : ndarray, (n_experts,), int64
    above : ndarray, (n_experts,), int64
        Read and written.
    """
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            if _key(scores[i, e]) > bound[e]:
                above[e] += 1


@kernel()
def take_highest(
    scores: NDArray[np.float32], bound: NDArray[np.int64], above: NDArray[np.int64], capacity: int, topk_ids: NDArray[np.int64],
    taken: NDArray[np.int64],
) -> None:  # fmt: skip
    """Every expert takes the tokens above its bound and, of those that equal it, the earliest that it has room for.

    Parameters
    ----------
    scores : ndarray, (t, n_experts), float32
    bound, above : ndarray, (n_experts,), int64
        The k-th highest key, and how many lie above it.
    capacity : int
        k.
    topk_ids : ndarray, (t, n_experts), int64
        Written: the experts that took a token, ascending, then `NOBODY`.
    taken : ndarray, (n_experts,), int64
        Read and written: tokens taken that equal the bound.
    """
    for i in range(scores.shape[0]):
        slot = 0
        for e in range(scores.shape[1]):
            key = _key(scores[i, e])
            takes = key > bound[e]
            if key == bound[e] and taken[e] < capacity - above[e]:
                taken[e] += 1
                takes = True
            if takes:
                topk_ids[i, slot] = e
                slot += 1
        while slot < topk_ids.shape[1]:
            topk_ids[i, slot] = NOBODY
            slot += 1


@kernel()
def weigh_chosen(
    logits: NDArray[np.float32], scores: NDArray[np.float32], rule: RouterCode, work: NDArray[np.float32], topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
) -> None:  # fmt: skip
    """Weights of experts that are chosen, as `wse_kernels.routing.route_tokens` gives them, among those that a token visits.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        With the gate's bias.
    scores : ndarray, (t, n_experts), float32
        Sinkhorn's, where the rule weighs by them; else not read.
    rule : RouterCode
    work : ndarray, (5, n_experts), float32
        Scratch.
    topk_ids : ndarray, (t, slots), int64
    topk_weights : ndarray, (t, slots), float32
        Written; 0 in slots of nobody.
    """
    for i in range(logits.shape[0]):
        n = 0
        while n < topk_ids.shape[1] and topk_ids[i, n] != NOBODY:
            n += 1
        for slot in range(n, topk_ids.shape[1]):
            topk_weights[i, slot] = _ZERO
        if n == 0 or topk_ids[i, 0] == TIED:
            for slot in range(n):
                topk_weights[i, slot] = _ZERO
            continue
        for e in range(logits.shape[1]):
            work[0, e] = stored(logits[i, e], rule.stored_as) if rule.rounds_logits else logits[i, e]
        if rule.weighting == SINKHORN:
            for e in range(logits.shape[1]):
                work[1, e] = scores[i, e]
        elif rule.weighting == rule.selection:
            expert_scores(work[0], rule.selection, work[1])
            for e in range(logits.shape[1]):
                work[1, e] = stored(work[1, e], rule.stored_as)
        raw_weights(rule, work, topk_ids[i, :n], topk_weights[i, :n])
        finish_weights(rule, topk_weights[i, :n])
