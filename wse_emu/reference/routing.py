"""The routing rule, plainly, for all tokens at once; in the dtype of the logits that it is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logsumexp, softmax

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference.formulas import Floats, Ints
from wse_emu.reference.storage import rounded


@dataclass(frozen=True, slots=True)
class Scores:
    """What a rule compares."""

    experts: Floats
    """(T, E) scores for the choice, the correction bias included."""
    groups: Floats
    """(T, n_group) scores of groups."""


def scores(logits: Floats, kind: str) -> Floats:
    """``softmax`` over experts, or elementwise ``sigmoid``, ``sqrtsoftplus``, ``none``; (T, E) -> (T, E)."""
    out: Floats
    if kind == "softmax":
        out = softmax(logits, axis=-1)
    elif kind == "sigmoid":
        out = expit(logits)
    elif kind == "sqrtsoftplus":
        out = np.sqrt(np.logaddexp(logits.dtype.type(0), logits))
    else:
        out = logits
    return out


def sinkhorn(logits: Floats, together: Ints, n_iters: int) -> Floats:
    """``r -= lse(r, experts); r -= lse(r, tokens)``, so many times, then exp; the tokens of one number in `together` (T,) meet."""
    out = logits.copy()
    for group in np.unique(together):
        r = logits[together == group]
        for _ in range(n_iters):
            r = r - logsumexp(r, axis=1, keepdims=True)
            r = r - logsumexp(r, axis=0, keepdims=True)
        out[together == group] = np.exp(r)
    return out


def with_capacity(value: Floats, together: Ints, k: int, rule: RoutingRule) -> Ints:
    """Experts of every token where experts have a capacity, from the scores that are compared: (T, E) -> (T, slots), -1 for none."""
    out = np.full((len(value), rule.slots(value.shape[1], k)), -1, np.int64)
    for group in np.unique(together):
        tokens = np.flatnonzero(together == group)
        room = rule.capacity(len(tokens), value.shape[1], k)
        decide = _experts_choose if rule.chooser == "expert" else _tokens_find_room
        for token, ids in zip(tokens.tolist(), decide(value[tokens], room, k, rule), strict=True):
            out[token, : len(ids)] = ids
    return out


def _experts_choose(value: Floats, room: int, _k: int, _rule: RoutingRule) -> list[list[int]]:
    """Every expert takes its highest tokens, of equal ones the earliest."""
    ids: list[list[int]] = [[] for _ in value]
    for expert in range(value.shape[1]):
        for token in np.argsort(-value[:, expert], kind="stable")[:room].tolist():
            ids[token].append(expert)
    return ids


def _tokens_find_room(value: Floats, room: int, k: int, rule: RoutingRule) -> list[list[int]]:
    """Choice by choice, token by token, as long as there is room."""
    n_open = rule.topk_group * (value.shape[1] // rule.n_group)
    ranked = choose(Scores(value, group_scores(value, rule)), n_open, rule).tolist()
    ids: list[list[int]] = [[] for _ in value]
    taken = dict.fromkeys(range(value.shape[1]), 0)
    for choice in range(n_open if rule.overflow == "reroute" else k):
        for token, order in enumerate(ranked):
            if len(ids[token]) < k and taken[order[choice]] < room:
                ids[token].append(order[choice])
                taken[order[choice]] += 1
    return ids


def compared_together(logits: Floats, together: Ints, rule: RoutingRule, correction: Floats | None) -> Floats:
    """Scores for the choice where tokens meet: those of one number in `together` (T,) do; (T, E) -> (T, E)."""
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    if rule.router_selection_nonlinearity == "sinkhorn":
        value = sinkhorn(used, together, rule.sinkhorn_n_iters)
    else:
        value = scores(used, rule.router_selection_nonlinearity)
    value = rounded(value, rule.selection_dtype)
    return value if correction is None else value + correction


def choose_together(value: Floats, together: Ints, k: int, rule: RoutingRule) -> Ints:
    """Experts of every token from `compared_together`'s scores: (T, slots) int64, -1 for none."""
    if rule.has_capacity:
        return with_capacity(value, together, k, rule)
    return choose(Scores(value, group_scores(value, rule)), k, rule)


def compared(logits: Floats, rule: RoutingRule, correction: Floats | None) -> Scores:
    """Scores of experts and groups for the choice; logits (T, E), correction (E,)."""
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    value = rounded(scores(used, rule.router_selection_nonlinearity), rule.selection_dtype)
    if correction is not None:
        value = value + correction
    return Scores(value, group_scores(value, rule))


def group_scores(value: Floats, rule: RoutingRule) -> Floats:
    """Scores of groups from those of experts: (T, E) -> (T, n_group)."""
    per_group = np.sort(value.reshape(len(value), rule.n_group, -1), axis=-1)
    out: Floats = per_group[:, :, -2:].sum(axis=-1) if rule.group_score == "top2_sum" else per_group[:, :, -1]
    return out


def highest(values: Floats, k: int, tie_policy: str) -> Ints:
    """Indices of the k highest, descending, ties by the policy ("reject" as "lowest_id"): (T, n) -> (T, k) int64."""
    n = values.shape[-1]
    order: Ints
    if tie_policy == "highest_id":
        order = n - 1 - np.argsort(-values[:, ::-1], axis=-1, kind="stable")
    else:
        order = np.argsort(-values, axis=-1, kind="stable")
    return order[:, :k].astype(np.int64)


def choose(seen: Scores, k: int, rule: RoutingRule) -> Ints:
    """Experts of every token, in descending order: (T, k) int64."""
    value = seen.experts
    if rule.topk_group < rule.n_group:
        opened = highest(seen.groups, rule.topk_group, rule.tie_policy)
        is_open = np.zeros(seen.groups.shape, np.bool_)
        np.put_along_axis(is_open, opened, True, axis=-1)
        value = np.where(np.repeat(is_open, value.shape[1] // rule.n_group, axis=-1), value, -np.inf)
    return highest(value, k, rule.tie_policy)


def assigned(numbers: Ints, num_experts: int, k: int) -> Ints:
    """``(number + slot) mod num_experts``: token ids (hash) or positions (uniform), (T,) -> (T, k)."""
    return (numbers[:, None] + np.arange(k)) % num_experts


def raw_weights(logits: Floats, ids: Ints, rule: RoutingRule) -> Floats:
    """Weights of the chosen experts before they are divided by their sum: (T, E), (T, k) -> (T, k).

    Of the logits; where the rule weighs by sinkhorn, of `shares`, given in their place.
    """
    if rule.weighs_together:
        return np.take_along_axis(logits, ids, axis=-1)
    used = logits if rule.router_fp32 else rounded(logits, rule.selection_dtype)
    kind = rule.expert_weighting_nonlinearity
    if kind == "softmax_topk":
        among: Floats = softmax(np.take_along_axis(used, ids, axis=-1), axis=-1)
        return among
    if kind == "sparsemixer":
        return _sparsemixer(used, ids, rule.router_jitter_noise)
    value = scores(used, kind)
    if kind == rule.router_selection_nonlinearity:
        value = rounded(value, rule.selection_dtype)
    return np.take_along_axis(value, ids, axis=-1)


def weights(logits: Floats, ids: Ints, rule: RoutingRule) -> Floats:
    """Weights of the chosen experts: (T, E), (T, k) -> (T, k); 0 where the id is -1. The first argument is `raw_weights`'."""
    if (ids < 0).any():
        out = np.zeros(ids.shape, logits.dtype)
        for n in range(1, ids.shape[1] + 1):
            mine = (ids >= 0).sum(axis=1) == n
            out[mine, :n] = weights(logits[mine], ids[mine, :n], rule)
        return out
    share = raw_weights(logits, ids, rule)
    if rule.expert_weighting_normalization:
        share = share / divisor(share, rule)
    scaled: Floats = share * logits.dtype.type(rule.routed_scaling_factor)
    return scaled


def shares(logits: Floats, together: Ints, rule: RoutingRule) -> Floats:
    """What weights are made of: the logits, or sinkhorn's scores of tokens that meet (those of one number in `together`, (T,)); (T, E)."""
    if not rule.weighs_together:
        return logits
    value = sinkhorn(logits if rule.router_fp32 else rounded(logits, rule.selection_dtype), together, rule.sinkhorn_n_iters)
    return rounded(value, rule.selection_dtype) if rule.router_selection_nonlinearity == "sinkhorn" else value


def divisor(share: Floats, rule: RoutingRule) -> Floats:
    """What the chosen weights are divided by: (T, k) -> (T, 1)."""
    extra = share.dtype.type(rule.null_expert_bias + rule.norm_epsilon)
    out: Floats = np.maximum(share.sum(axis=-1, keepdims=True) + extra, share.dtype.type(rule.norm_min))
    return out


def sparsemixer_terms(logits: Floats, ids: Ints) -> tuple[Floats, Floats]:
    """What sparsemixer sums for each slot, (T, k, E): exponentials of the experts that are left, and how far each is below, relatively."""
    left = np.ones((*ids.shape, logits.shape[1]), np.bool_)
    for slot in range(1, ids.shape[1]):
        left[:, slot:] &= np.arange(logits.shape[1]) != ids[:, slot - 1, None, None]
    best = np.take_along_axis(logits, ids, axis=-1)[:, :, None]
    below = best - logits[:, None, :]
    size = np.maximum(np.abs(logits[:, None, :]), best)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = below / size
    terms: Floats = np.where(left, np.exp(-below), 0).astype(logits.dtype)
    return terms, ratio


def _sparsemixer(logits: Floats, ids: Ints, noise: float) -> Floats:
    terms, ratio = sparsemixer_terms(logits, ids)
    out: Floats = 1 / np.where(ratio > 2 * noise, 0, terms).sum(axis=-1)
    return out
