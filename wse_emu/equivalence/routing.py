"""Routing decisions: held against the run's own scores, and against float64 scores as sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.report import NearTie
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import formulas

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
    """Tokens whose experts are not the highest of their own scores, descending, equal ones by lowest id."""
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
    record: TapRecord, layer: int, topk_ids: NDArray[np.int64], own_logits: NDArray[Any], exact: F64, bound: F64
) -> LayerRouting:
    """Judge the decisions of one layer.

    Parameters
    ----------
    topk_ids : ndarray, (T, k), int64
        Decisions of the run, valid and distinct.
    own_logits : ndarray, (T, E), float32
        The run's router logits. `topk_ids` must be their k highest, descending, equal ones by lowest id. The rule speaks of float32
        probabilities, which may be equal where logits are not: only there may the order differ (`probability_tolerance`).
    exact, bound : ndarray, (T, E), float64
        Logits computed from the run's own input of the router, and the tolerance of each. A differing set is excused only if no expert
        that was passed over scores higher than one taken by more than the tolerances of the two scores and probabilities.
    """
    k = topk_ids.shape[1]
    out = LayerRouting()
    ranked = -np.sort(-own_logits, axis=1)[:, : k + 1]
    out.exact_ties = int((np.diff(ranked, axis=1) == 0).any(axis=1).sum())
    own = own_logits.astype(np.float64)
    other_order = (topk_ids != formulas.top_k(own, k)).any(axis=1)
    other_set = (np.sort(topk_ids, axis=1) != np.sort(formulas.top_k(exact, k), axis=1)).any(axis=1)
    for token in np.flatnonzero(other_order | other_set).tolist():
        ids = topk_ids[token]
        order = _worst(_order_inversions(ids, own[token])) if other_order[token] else None
        swap = _worst(_set_inversions(ids, exact[token], bound[token])) if other_set[token] else None
        if order is not None:
            out.misordered += not order.excused
            out.rounded_ties += order.excused
        if swap is not None and swap.excused:
            if swap.gap * out.worst[1] >= out.worst[0] * swap.tolerance:
                out.worst = (swap.gap, swap.tolerance)
            out.near_ties.append(_near_tie(record, layer, token, ids, exact[token], swap))
        elif swap is not None:
            out.swaps += 1
        bad = [i for i in (order, swap) if i is not None and not i.excused]
        if bad:
            out.faulty_tokens += 1
            out.fault = out.fault or _fault(token, ids, own[token], order, swap, bad[0])
    return out


def probability_tolerance(logits: F64) -> F64:
    """How far apart two logits may lie while their float32 probabilities are equal or in the other order: (E,) -> (E, E).

    Each probability is an exponential of a rounded difference, divided: ``2 u + u |l - max| + u`` of relative error. Where both are below
    the smallest normal number they may both be zero, and any distance is allowed.
    """
    gap = logits.max() - logits
    each = tolerance.EXP_ERROR + tolerance.U * gap + tolerance.U
    lost = np.exp(-gap) <= len(logits) * tolerance.SMALLEST_NORMAL  # the denominator is at most E
    return np.where(lost[:, None] & lost[None, :], np.inf, each[:, None] + each[None, :])


def _order_inversions(ids: NDArray[np.int64], own: F64) -> list[_Inversion]:
    """Pairs of which the later (or unchosen) expert should stand before the earlier one, by the run's own scores."""
    allowed = probability_tolerance(own)
    rest = np.setdiff1d(np.arange(len(own)), ids)
    out = []
    for slot, taken in enumerate(ids.tolist()):
        for other in [*ids[slot + 1 :].tolist(), *rest.tolist()]:
            gap = float(own[other] - own[taken])
            if gap > 0:
                out.append(_Inversion(slot, taken, other, gap, float(allowed[taken, other])))
            elif gap == 0 and other < taken:
                out.append(_Inversion(slot, taken, other, 0.0, -1.0))
    return out


def _set_inversions(ids: NDArray[np.int64], exact: F64, bound: F64) -> list[_Inversion]:
    """Pairs of a chosen and an unchosen expert of which float64 scores the unchosen one higher (or as high)."""
    allowed = probability_tolerance(exact) + bound[:, None] + bound[None, :]
    rest = np.setdiff1d(np.arange(len(exact)), ids)
    return [
        _Inversion(slot, taken, other, float(exact[other] - exact[taken]), float(allowed[taken, other]))
        for slot, taken in enumerate(ids.tolist())
        for other in rest.tolist()
        if exact[other] > exact[taken] or (exact[other] == exact[taken] and other < taken)
    ]


def _worst(inversions: list[_Inversion]) -> _Inversion | None:
    """Prefer what is not excused, in slot order; else what comes closest to its tolerance."""
    if not inversions:
        return None
    bad = [i for i in inversions if not i.excused]
    return bad[0] if bad else max(inversions, key=lambda i: i.gap - i.tolerance)


def _near_tie(record: TapRecord, layer: int, token: int, ids: NDArray[np.int64], exact: F64, worst: _Inversion) -> NearTie:
    ideal = formulas.top_k(exact[None], len(ids))[0]
    return NearTie(
        layer=layer,
        token=(int(record.seq[token]), int(record.pos[token])),
        chosen=tuple(np.setdiff1d(ids, ideal).tolist()),
        ideal=tuple(np.setdiff1d(ideal, ids).tolist()),
        gap=worst.gap,
        tolerance=worst.tolerance,
    )


def _fault(
    token: int, ids: NDArray[np.int64], own: F64, order: _Inversion | None, swap: _Inversion | None, named: _Inversion
) -> RoutingFault:
    parts = []
    if order is not None and not order.excused:
        ranked = formulas.top_k(own[None], len(ids))[0].tolist()
        parts.append(f"chose experts {ids.tolist()}, its own router logits rank {ranked} (descending, equal ones by lowest id)")
    if swap is not None and not swap.excused:
        parts.append(
            f"float64 logits put expert {swap.passed_over} above expert {swap.taken} by {swap.gap:.3g}, tolerance {swap.tolerance:.3g}"
        )
    return RoutingFault(
        token=token,
        slot=named.slot,
        expert=named.taken,
        gap=named.gap,
        tolerance=max(named.tolerance, 0.0),
        message="; ".join(parts),
    )
