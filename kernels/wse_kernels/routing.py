"""Routing rules: which experts a token visits and with which weight, on the core where its scores meet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wse_kernels._jit import helper, kernel
from wse_kernels.exp import exp32, sigmoid32
from wse_kernels.formats import bf16_of_f32, cb16_of_f32, f16_of_f32, f32_of_bf16, f32_of_cb16, f32_of_f16
from wse_kernels.log import softplus32

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_INF = np.float32(np.inf)


@kernel()
def softmax_topk(
    logits: NDArray[np.float32],
    renormalize: bool,
    probs: NDArray[np.float32],
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
) -> None:
    """Softmax over experts, then the `top_k` most probable, ties to the lowest id.

    What `route_tokens` does for the plainest rule, the same bits, compiled in a fifth of the time.

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


class RouterCode(NamedTuple):
    """A routing rule as a kernel takes it: typed numbers, so that one body serves all rules."""

    selection: int
    """`SOFTMAX`, `SIGMOID`, `SQRTSOFTPLUS`, `LOGITS` or `SINKHORN`: from logits to the scores that are compared."""
    weighting: int
    """One of those (but not `LOGITS`), `SOFTMAX_TOPK` or `SPARSEMIXER`: from logits to weights."""
    n_group: int
    topk_group: int
    top2_sum: int
    """Whether a group's score is the sum of its two highest, else its highest."""
    tie: int
    """`LOWEST_ID`, `HIGHEST_ID` or `REJECT`."""
    stored_as: int
    """`FLOAT32`, `BFLOAT16`, `FLOAT16` or `CB16`: what scores are rounded to."""
    rounds_logits: int
    """Whether logits are rounded so, too."""
    has_bias: int
    has_correction: int
    normalizes: int
    null_bias: np.float32
    epsilon: np.float32
    least: np.float32
    """Least value of the divisor."""
    scale: np.float32
    jitter: np.float32
    """Width of sparsemixer's band, twice the noise."""


SOFTMAX, SIGMOID, SQRTSOFTPLUS, LOGITS, SOFTMAX_TOPK, SPARSEMIXER, SINKHORN = range(7)
LOWEST_ID, HIGHEST_ID, REJECT = range(3)
FLOAT32, BFLOAT16, FLOAT16, CB16 = range(4)
NOBODY = -1
"""In a slot of a token that visits fewer experts than it has slots; such slots come last."""
TIED = -2
"""In a token's first slot, where a tie is refused."""
WORK_ROWS = 5
"""Rows of `route_tokens`'s scratch: logits as used, scores, scores for the choice, whether shut, scores of groups."""


@helper
def stored(x: np.float32, stored_as: int) -> np.float32:
    """`x` as a format of 16 bits holds it."""
    if stored_as == BFLOAT16:
        return f32_of_bf16(bf16_of_f32(x))
    if stored_as == FLOAT16:
        return f32_of_f16(f16_of_f32(x))
    if stored_as == CB16:
        return f32_of_cb16(cb16_of_f32(x))
    return x


@helper
def expert_scores(logits: NDArray[np.float32], kind: int, out: NDArray[np.float32]) -> None:
    """Scores of all experts. Softmax: exact maximum, then exponentials summed over ascending ids, then divided."""
    n_experts = logits.shape[0]
    if kind == SOFTMAX:
        top = logits[0]
        for e in range(1, n_experts):
            if logits[e] > top:
                top = logits[e]
        denominator = _ZERO
        for e in range(n_experts):
            out[e] = exp32(logits[e] - top)
            denominator = denominator + out[e]
        for e in range(n_experts):
            out[e] = out[e] / denominator
    else:
        for e in range(n_experts):
            x = logits[e]
            if kind == SIGMOID:
                x = sigmoid32(x)
            elif kind == SQRTSOFTPLUS:
                x = np.sqrt(softplus32(x))
            out[e] = x


@helper
def best_of(values: NDArray[np.float32], shut: NDArray[np.float32], n: int, tie: int) -> int:
    """Index of the highest value that is not shut; one that is no number stays where it is first, and beats nothing."""
    best = -1
    for e in range(n):
        if shut[e] == _ZERO and (best < 0 or values[e] > values[best] or (tie == HIGHEST_ID and values[e] == values[best])):
            best = e
    return best


@helper
def is_tied(values: NDArray[np.float32], shut: NDArray[np.float32], n: int, last: np.float32) -> bool:
    """Whether a value that was passed over equals the last one taken."""
    for e in range(n):
        if shut[e] == _ZERO and values[e] == last:
            return True
    return False


@helper
def shut_groups(rule: RouterCode, work: NDArray[np.float32]) -> bool:
    """Shut the experts of all groups but the best; whether a tie decided."""
    choice, shut, groups = work[2], work[3], work[4]
    size = choice.shape[0] // rule.n_group
    for g in range(rule.n_group):
        first = choice[g * size]
        second = -_INF
        for e in range(g * size + 1, (g + 1) * size):
            value = choice[e]
            if value > first:
                second = first
                first = value
            elif value > second:
                second = value
        groups[g] = first + second if rule.top2_sum else first
        shut[g] = _ZERO
    last = _ZERO
    for _ in range(rule.topk_group):
        g = best_of(groups, shut, rule.n_group, rule.tie)
        last = groups[g]
        shut[g] = _ONE
    tied = is_tied(groups, shut, rule.n_group, last)
    # Marks of groups become marks of experts, from the end, so that none is overwritten before it is read.
    for g in range(rule.n_group - 1, -1, -1):
        mark = _ONE - shut[g]
        for e in range((g + 1) * size - 1, g * size - 1, -1):
            shut[e] = mark
    return tied


@helper
def raw_weights(rule: RouterCode, work: NDArray[np.float32], ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Weights of the chosen experts before they are divided by their sum."""
    logits, scores, shut = work[0], work[1], work[3]
    n_experts, top_k = logits.shape[0], ids.shape[0]
    if rule.weighting == SOFTMAX_TOPK:
        top = logits[ids[0]]
        for slot in range(1, top_k):
            if logits[ids[slot]] > top:
                top = logits[ids[slot]]
        denominator = _ZERO
        for slot in range(top_k):
            out[slot] = exp32(logits[ids[slot]] - top)
            denominator = denominator + out[slot]
        for slot in range(top_k):
            out[slot] = out[slot] / denominator
    elif rule.weighting == SPARSEMIXER:
        shut[:] = _ZERO
        for slot in range(top_k):
            best = logits[ids[slot]]
            denominator = _ZERO
            for e in range(n_experts):
                size = abs(logits[e])
                size = size if size > best else best
                if shut[e] == _ZERO and not (best - logits[e]) / size > rule.jitter:
                    denominator = denominator + exp32(logits[e] - best)
            out[slot] = _ONE / denominator
            shut[ids[slot]] = _ONE
    else:
        if rule.weighting != rule.selection and rule.weighting != SINKHORN:
            expert_scores(logits, rule.weighting, scores)
        for slot in range(top_k):
            out[slot] = scores[ids[slot]]


@helper
def finish_weights(rule: RouterCode, weights: NDArray[np.float32]) -> None:
    """Divide weights by their sum, summed over ascending slots, and scale them, as the rule says."""
    if rule.normalizes:
        total = _ZERO
        for slot in range(weights.shape[0]):
            total = total + weights[slot]
        total = (total + rule.null_bias) + rule.epsilon
        total = rule.least if total < rule.least else total
        for slot in range(weights.shape[0]):
            weights[slot] = weights[slot] / total
    if rule.scale != _ONE:
        for slot in range(weights.shape[0]):
            weights[slot] = weights[slot] * rule.scale


@kernel()
def route_tokens(
    logits: NDArray[np.float32],
    bias: NDArray[np.float32],
    correction: NDArray[np.float32],
    rule: RouterCode,
    work: NDArray[np.float32],
    topk_ids: NDArray[np.int64],
    topk_weights: NDArray[np.float32],
) -> None:
    """Choose experts and weigh them, token by token, as a rule says.

    Every sum over experts runs over ascending ids, every sum over the chosen ones over ascending slots, from +0. The chosen experts are
    always distinct: where scores are no numbers the weights are none either, and the lowest ids are taken.

    Parameters
    ----------
    logits : ndarray, (t, n_experts), float32
        Products with the gate; the gate's bias, if there is one, is added in place.
    bias, correction : ndarray, (1, n_experts), float32
        Of the gate, and added to scores for the choice; not read where the rule has none.
    rule : RouterCode
    work : ndarray, (5, n_experts), float32
        Scratch.
    topk_ids : ndarray, (t, top_k), int64
        Written: experts in descending order of their scores for the choice. With `REJECT`, `TIED` in the first place where equal scores
        leave the set open.
    topk_weights : ndarray, (t, top_k), float32
        Written.

    References
    ----------
    Jiang et al., "Mixtral of Experts", 2024, section 2.1; DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.2, and "DeepSeek-V3", 2024, section
    2.1.2; Liu et al., "GRIN: GRadient-INformed MoE", 2024 (sparsemixer).
    """
    n_experts = logits.shape[1]
    used, scores, choice, shut = work[0], work[1], work[2], work[3]
    for i in range(logits.shape[0]):
        for e in range(n_experts):
            if rule.has_bias:
                logits[i, e] = logits[i, e] + bias[0, e]
            used[e] = stored(logits[i, e], rule.stored_as) if rule.rounds_logits else logits[i, e]
        expert_scores(used, rule.selection, scores)
        for e in range(n_experts):
            scores[e] = stored(scores[e], rule.stored_as)
            choice[e] = scores[e] + correction[0, e] if rule.has_correction else scores[e]
            shut[e] = _ZERO
        tied = False
        if rule.topk_group < rule.n_group:
            tied = shut_groups(rule, work)
        last = _ZERO
        for slot in range(topk_ids.shape[1]):
            best = best_of(choice, shut, n_experts, rule.tie)
            topk_ids[i, slot] = best
            last = choice[best]
            shut[best] = _ONE
        tied = tied or is_tied(choice, shut, n_experts, last)
        raw_weights(rule, work, topk_ids[i], topk_weights[i])
        finish_weights(rule, topk_weights[i])
        if tied and rule.tie == REJECT:
            topk_ids[i, 0] = TIED


@kernel()
def assign_experts(
    numbers: NDArray[np.int64], n_experts: int, weight: np.float32, topk_ids: NDArray[np.int64], topk_weights: NDArray[np.float32]
) -> None:
    """Experts by number: ``(numbers[i] + slot) mod n_experts``, all with one weight.

    Token ids give hash routing, positions uniform routing.

    Parameters
    ----------
    numbers : ndarray, (t,), int64
        Not negative.
    n_experts : int
    weight : float32
    topk_ids, topk_weights : ndarray, (t, top_k), int64 and float32
        Written.
    """
    for i in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            topk_ids[i, slot] = (numbers[i] + slot) % n_experts
            topk_weights[i, slot] = weight


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
            if topk_ids[i, slot] != NOBODY:
                starts[topk_ids[i, slot] + 1] += 1
    for e in range(1, starts.shape[0]):
        starts[e] += starts[e - 1]
    for i in range(topk_ids.shape[0]):
        for slot in range(topk_ids.shape[1]):
            e = topk_ids[i, slot]
            if e != NOBODY:
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
            if e != NOBODY:
                mask[e // 32] |= np.int32(np.uint32(1) << np.uint32(e % 32))


@kernel()
def merge_bits(mask: NDArray[np.int32], other: NDArray[np.int32]) -> None:
    """``mask |= other``, both (n,) int32."""
    for i in range(mask.shape[0]):
        mask[i] |= other[i]
