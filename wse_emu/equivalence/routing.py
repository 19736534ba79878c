"""Routing decisions: held against the run's own scores, and against float64 scores as sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence.report import NearTie
from wse_emu.equivalence.routing_bounds import Compared, compare
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING, RoutingRule
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import routing

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFault:
    """The first token of a layer whose experts are wrong."""

    token: int
    slot: int
    expert: int
    gap: float
    """How far the score of the expert that was passed over lies above the chosen one's."""
    tolerance: float
    message: str


@dataclass(slots=True, kw_only=True)
class LayerRouting:
    """What the routing decisions of one layer came to."""

    exact_ties: int = 0
    """Tokens of whose k + 1 highest own scores two are equal."""
    rounded_ties: int = 0
    """Tokens whose order differs from that of their own scores, but only where float32 probabilities may be equal."""
    near_ties: list[NearTie] = field(default_factory=list)
    swaps: int = 0
    """Tokens whose set differs from float64's by more than the tolerance."""
    misordered: int = 0
    """Tokens whose experts are not what the rule makes of their own scores."""
    faulty_tokens: int = 0
    """Tokens that are swapped or misordered, or both."""
    worst: tuple[float, float] = (0.0, 1.0)
    """Gap and tolerance of the near-tie that comes closest to its tolerance."""
    fault: RoutingFault | None = None


@dataclass(frozen=True, slots=True)
class _Inversion:
    """Expert `passed_over` scores `gap` above expert `taken`, which was preferred to it."""

    slot: int
    taken: int
    passed_over: int
    gap: float
    tolerance: float

    @property
    def excused(self) -> bool:
        """Whether the scores are closer than the tolerance; an exact tie that the higher id won (tolerance < 0) never is."""
        return self.gap <= self.tolerance


def judge_routing(
    record: TapRecord, layer: int, topk_ids: NDArray[np.int64], own_logits: NDArray[Any], exact: F64, bound: F64, *,
    rule: RoutingRule = MIXTRAL_ROUTING, correction: F64 | None = None,
) -> LayerRouting:  # fmt: skip
    """Judge the decisions of one layer.

    Parameters
    ----------
    topk_ids : ndarray, (T, k), int64
        Decisions of the run, valid and distinct.
    own_logits : ndarray, (T, E), float32
        The run's router logits. `topk_ids` must be what the rule makes of them: of the open groups the k highest, descending, ties by the
        rule's policy. The rule speaks of float32 scores, which may be equal where float64 ones are not: only there may the order differ.
    exact, bound : ndarray, (T, E), float64
        Logits computed from the run's own input of the router, and the tolerance of each. A differing set is excused only if no expert
        (or group) that was passed over scores higher than one taken by more than the tolerances of the two logits and scores.
    rule : RoutingRule
        Of algorithm "learned".
    correction : ndarray, (E,), float64, optional
        Correction bias.
    """
    k = topk_ids.shape[1]
    out = LayerRouting()
    wide = own_logits.astype(np.float64)
    own = compare(wide, np.zeros_like(wide), rule, correction)
    true = compare(exact, bound, rule, correction)
    out.exact_ties = _ties(own.seen.experts, k)
    of_own, ideal = routing.choose(own.seen, k, rule), routing.choose(true.seen, k, rule)
    other_order = (topk_ids != of_own).any(axis=1)
    other_set = (np.sort(topk_ids, axis=1) != np.sort(ideal, axis=1)).any(axis=1)
    for token in np.flatnonzero(other_order | other_set).tolist():
        ids = topk_ids[token]
        order = _worst(_inversions(ids, token, own, rule, ordered=True)) if other_order[token] else None
        swap = _worst(_inversions(ids, token, true, rule, ordered=False)) if other_set[token] else None
        if order is not None:
            out.misordered += not order.excused
            out.rounded_ties += order.excused
        if swap is not None and swap.excused:
            if swap.gap * out.worst[1] >= out.worst[0] * swap.tolerance:
                out.worst = (swap.gap, swap.tolerance)
            out.near_ties.append(_near_tie(record, layer, token, ids, ideal[token], swap))
        elif swap is not None:
            out.swaps += 1
        bad = [i for i in (order, swap) if i is not None and not i.excused]
        if bad:
            out.faulty_tokens += 1
            out.fault = out.fault or _fault(token, ids, of_own[token], order, swap, bad[0])
    return out


def judge_together(
    topk_ids: NDArray[np.int64], own_scores: NDArray[Any], together: NDArray[np.int64], k: int, rule: RoutingRule
) -> LayerRouting:
    """Judge decisions of tokens that meet (those of one number in `together`): nothing is excused.

    `own_scores` (T, E) are the run's own; the decision follows from them without another rounding.
    """
    expected = routing.choose_together(own_scores.astype(np.float64), together, k, rule)
    found = _judge_exactly(topk_ids, expected, lambda token: f"by the scores of all tokens it is {expected[token].tolist()}")
    found.exact_ties = 0 if rule.chooser == "expert" else _ties(own_scores, k)
    return found


def judge_assigned(topk_ids: NDArray[np.int64], numbers: NDArray[np.int64], num_experts: int) -> LayerRouting:
    """Judge decisions by number (hash, uniform): nothing is excused."""
    expected = routing.assigned(numbers, num_experts, topk_ids.shape[1])
    return _judge_exactly(topk_ids, expected, lambda token: f"number {int(numbers[token])} names {expected[token].tolist()}")


def _ties(scores: NDArray[Any], k: int) -> int:
    """Tokens of whose k + 1 highest scores, of (T, E), two are equal."""
    ranked = -np.sort(-scores, axis=1)[:, : k + 1]
    return int((np.diff(ranked, axis=1) == 0).any(axis=1).sum())


def _judge_exactly(topk_ids: NDArray[np.int64], expected: NDArray[np.int64], reason: Callable[[int], str]) -> LayerRouting:
    """The first decision that is not the expected one is the fault; `reason` says of a token what it should be."""
    wrong = np.argwhere(topk_ids != expected)
    out = LayerRouting()
    if len(wrong):
        token, slot = (int(v) for v in wrong[0])
        out.misordered = out.faulty_tokens = len(np.unique(wrong[:, 0]))
        out.fault = RoutingFault(
            token=token, slot=slot, expert=max(int(topk_ids[token, slot]), 0), gap=0.0, tolerance=0.0,
            message=f"chose experts {topk_ids[token].tolist()}, {reason(token)}",
        )  # fmt: skip
    return out


def _inversions(ids: NDArray[np.int64], token: int, seen: Compared, rule: RoutingRule, *, ordered: bool) -> list[_Inversion]:
    """Pairs of which the one passed over should have been preferred to the one taken: experts, and groups by their experts.

    `ordered` also compares chosen experts with those that stand behind them. An expert that was not chosen counts only if its group was
    open for certain.
    """
    values, allowed = seen.seen.experts[token], seen.allowed(token)
    groups, open_groups = _group_inversions(ids, token, seen, rule)
    size = len(values) // rule.n_group
    rest = [e for e in np.setdiff1d(np.arange(len(values)), ids).tolist() if open_groups[e // size]]
    out = groups
    for slot, taken in enumerate(ids.tolist()):
        for other in [*(ids[slot + 1 :].tolist() if ordered else ()), *rest]:
            found = _inversion(slot, taken, other, values[taken], values[other], allowed[taken, other], rule)
            if found is not None:
                out.append(found)
    return out


def _inversion(slot: int, taken: int, other: int, low: float, high: float, allowed: float, rule: RoutingRule) -> _Inversion | None:
    """The pair, if `other` scores higher, or as high and the policy prefers it."""
    gap = float(high - low)
    if gap > 0:
        return _Inversion(slot, taken, other, gap, float(allowed))
    if gap == 0 and (other > taken) == (rule.tie_policy == "highest_id"):
        return _Inversion(slot, taken, other, 0.0, float(allowed) if allowed > 0 and rule.e_score_correction_bias else -1.0)
    return None


def _group_inversions(
    ids: NDArray[np.int64], token: int, seen: Compared, rule: RoutingRule
) -> tuple[list[_Inversion], NDArray[np.bool_]]:
    """Groups that were opened against their score, and (n_group,) which groups were open for certain."""
    if rule.topk_group == rule.n_group:
        return [], np.ones(rule.n_group, np.bool_)
    values, groups, error = seen.seen.experts[token], seen.seen.groups[token], seen.group_error[token]
    size = len(values) // rule.n_group
    used = np.unique(ids // size)
    best = routing.highest(groups[None], rule.topk_group, rule.tie_policy)[0]
    missed = np.setdiff1d(best, used)
    out = []
    for group in np.setdiff1d(used, best).tolist():
        # Some group of the best was shut; the lowest of those that gave no expert is the mildest explanation.
        shut = int(missed[np.argmin(groups[missed])])
        slot = int(np.flatnonzero(ids // size == group)[0])
        passed_over = int(shut * size + values[shut * size : (shut + 1) * size].argmax())
        found = _inversion(slot, int(ids[slot]), passed_over, groups[group], groups[shut], error[group] + error[shut], rule)
        if found is not None:
            out.append(found)
    is_open = np.zeros(rule.n_group, np.bool_)
    rest = np.setdiff1d(np.arange(rule.n_group), best)
    is_open[best] = groups[best] - error[best] > (groups[rest] + error[rest]).max()
    is_open[used] = True
    return out, is_open


def _worst(inversions: list[_Inversion]) -> _Inversion | None:
    """Prefer what is not excused, in slot order; else what comes closest to its tolerance."""
    if not inversions:
        return None
    bad = [i for i in inversions if not i.excused]
    return bad[0] if bad else max(inversions, key=lambda i: i.gap - i.tolerance)


def _near_tie(
    record: TapRecord, layer: int, token: int, ids: NDArray[np.int64], ideal: NDArray[np.int64], worst: _Inversion
) -> NearTie:
    return NearTie(
        layer=layer,
        token=(int(record.seq[token]), int(record.pos[token])),
        chosen=tuple(np.setdiff1d(ids, ideal).tolist()),
        ideal=tuple(np.setdiff1d(ideal, ids).tolist()),
        gap=worst.gap,
        tolerance=worst.tolerance,
    )


def _fault(
    token: int, ids: NDArray[np.int64], of_own: NDArray[np.int64], order: _Inversion | None, swap: _Inversion | None, named: _Inversion
) -> RoutingFault:
    parts = []
    if order is not None and not order.excused:
        parts.append(f"chose experts {ids.tolist()}, its own router logits rank {of_own.tolist()} (descending, ties by the rule's policy)")
    if swap is not None and not swap.excused:
        parts.append(
            f"float64 scores put expert {swap.passed_over} above expert {swap.taken} by {swap.gap:.3g}, tolerance {swap.tolerance:.3g}"
        )
    return RoutingFault(
        token=token,
        slot=named.slot,
        expert=named.taken,
        gap=named.gap,
        tolerance=max(named.tolerance, 0.0),
        message="; ".join(parts),
    )
