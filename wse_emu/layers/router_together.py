"""Routing rules under which the tokens of a sequence meet, as a program of the cores that hold their scores.

The scores of a sequence's tokens lie in one column of cores, on the rows of the tokens: a core for each row. What the tokens have in
common is handed down that column, each core adding its own tokens, and, where all need it, told back up it. So no core holds more scores
than those of its row, and every sum runs over ascending tokens wherever the rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block, Borrow, Cores
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints
from wse_emu.wafer.traffic import Traffic
from wse_kernels import routing_together as bodies
from wse_kernels.routing import FLOAT32, SINKHORN, WORK_ROWS, RouterCode

_SCORE = Kernel(
    body=bodies.score_tokens, params=("logits", "bias", "correction", "rule", "scores"), inout=("logits",), out=("scores",), code_bytes=896
)
_OVER_EXPERTS = Kernel(body=bodies.sinkhorn_over_experts, params=("scores",), inout=("scores",), code_bytes=416)
_MAXIMUM = Kernel(body=bodies.sinkhorn_maximum, params=("scores", "top"), inout=("top",), code_bytes=96)
_SUM = Kernel(body=bodies.sinkhorn_sum, params=("scores", "top", "total"), inout=("total",), code_bytes=256)
_OVER_TOKENS = Kernel(body=bodies.sinkhorn_over_tokens, params=("scores", "top", "total"), inout=("scores",), code_bytes=256)
_SINKHORN_END = Kernel(body=bodies.sinkhorn_end, params=("scores", "correction", "rule"), inout=("scores",), code_bytes=384)
_CHOOSE = Kernel(
    body=bodies.choose_by_scores, params=("scores", "rule", "work", "topk_ids"), out=("topk_ids",), scratch=("work",), code_bytes=640
)
_OPEN = Kernel(
    body=bodies.open_to_tokens, params=("scores", "rule", "work", "tried", "topk_ids"), out=("tried", "topk_ids"), scratch=("work",),
    code_bytes=512,
)  # fmt: skip
_TAKE_ROOM = Kernel(
    body=bodies.take_room, params=("scores", "rule", "capacity", "work", "tried", "topk_ids", "taken"),
    inout=("tried", "topk_ids", "taken"), scratch=("work",), code_bytes=384,
)  # fmt: skip
_COUNT_REACHING = Kernel(body=bodies.count_reaching, params=("scores", "bound", "bit", "reaching"), inout=("reaching",), code_bytes=128)
_SETTLE_BIT = Kernel(body=bodies.settle_bit, params=("reaching", "bit", "capacity", "bound"), inout=("bound",), code_bytes=64)
_COUNT_ABOVE = Kernel(body=bodies.count_above, params=("scores", "bound", "above"), inout=("above",), code_bytes=128)
_TAKE_HIGHEST = Kernel(
    body=bodies.take_highest, params=("scores", "bound", "above", "capacity", "topk_ids", "taken"), inout=("taken",), out=("topk_ids",),
    code_bytes=224,
)  # fmt: skip
_WEIGH = Kernel(
    body=bodies.weigh_chosen, params=("logits", "scores", "rule", "work", "topk_ids", "topk_weights"), out=("topk_weights",),
    scratch=("work",), code_bytes=1536,
)  # fmt: skip
_BITS = 32
"""Of the keys that order scores."""


@dataclass(frozen=True, slots=True)
class Station:
    """One core's tokens of one sequence."""

    core: tuple[int, int]
    blocks: Mapping[str, Any]
    """Arguments of the kernels by name: blocks, and one number where there is no bias."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A kernel that every core of the column runs; with a state, one after the other."""

    kernel: Kernel
    scalars: Mapping[str, Any]
    state: str = ""
    """Numbers that are handed from core to core."""
    start: float | None = None
    """What they begin with; None is what the first core has."""
    shared: bool = False
    """Whether all cores are told them afterwards."""
    scores: str = "scores"
    """Which block takes the place of `scores`: what is compared, or "shares", of which weights are made."""


def _steps(rule: RoutingRule, code: RouterCode | None, n_tokens: int, n_experts: int, top_k: int) -> Iterator[_Step]:
    """The program for a sequence of `n_tokens`."""
    by_rule = {"rule": code}
    yield _Step(_SCORE, by_rule)
    if rule.router_selection_nonlinearity == "sinkhorn":
        yield from _sinkhorn(rule, code, "scores")
    room = {"capacity": rule.capacity(n_tokens, n_experts, top_k)}
    if rule.chooser == "expert":
        for bit in range(_BITS - 1, -1, -1):
            yield _Step(_COUNT_REACHING, {"bit": bit}, "reaching", 0, shared=True)
            yield _Step(_SETTLE_BIT, {"bit": bit, **room})
        yield _Step(_COUNT_ABOVE, {}, "above", 0, shared=True)
        yield _Step(_TAKE_HIGHEST, room, "taken", 0)
    elif rule.has_capacity:
        yield _Step(_OPEN, by_rule)
        rounds = n_experts if rule.overflow == "reroute" else top_k
        for i in range(rounds):  # as many as may be needed: what happens in them is data
            yield _Step(_TAKE_ROOM, {**by_rule, **room}, "taken", 0 if i == 0 else None, shared=i + 1 < rounds)
    else:
        yield _Step(_CHOOSE, by_rule)
    if not _has_shares(rule):
        yield _Step(_WEIGH, by_rule)
        return
    own = None if code is None else code._replace(selection=SINKHORN, has_bias=0, has_correction=0)  # the bias is added by now
    yield _Step(_SCORE, {"rule": own}, scores="shares")
    if own is not None and rule.router_selection_nonlinearity != "sinkhorn":
        own = own._replace(stored_as=FLOAT32)
    yield from _sinkhorn(rule, own, "shares")
    yield _Step(_WEIGH, by_rule, scores="shares")


def _sinkhorn(rule: RoutingRule, code: RouterCode | None, scores: str) -> Iterator[_Step]:
    for _ in range(rule.sinkhorn_n_iters):
        yield _Step(_OVER_EXPERTS, {}, scores=scores)
        yield _Step(_MAXIMUM, {}, "top", -np.inf, shared=True, scores=scores)
        yield _Step(_SUM, {}, "total", 0, shared=True, scores=scores)
        yield _Step(_OVER_TOKENS, {}, scores=scores)
    yield _Step(_SINKHORN_END, {"rule": code}, scores=scores)


def _has_shares(rule: RoutingRule) -> bool:
    """Whether weights are made of sinkhorn's scores, and those are not what is compared."""
    return rule.weighs_together and (rule.router_selection_nonlinearity != "sinkhorn" or rule.e_score_correction_bias)


def _states(rule: RoutingRule) -> dict[str, type[np.generic]]:
    """Rows of numbers, one for each expert, that a core holds beside its tokens."""
    out: dict[str, type[np.generic]] = {}
    if "sinkhorn" in (rule.router_selection_nonlinearity, rule.expert_weighting_nonlinearity):
        out |= {"top": np.float32, "total": np.float32}
    if rule.chooser == "expert":
        out |= {"bound": np.int64, "reaching": np.int64, "above": np.int64}
    if rule.has_capacity:
        out["taken"] = np.int64
    return out


def _notes(rule: RoutingRule) -> bool:
    """Whether tokens keep note of the experts that they tried."""
    return rule.has_capacity and rule.chooser == "token"


def code_bytes(rule: RoutingRule, n_experts: int, top_k: int) -> int:
    """Of all kernels of a rule."""
    return sum(kernel.code_bytes for kernel in {step.kernel for step in _steps(rule, None, 1, n_experts, top_k)})


def words(rule: RoutingRule, n: int, n_experts: int) -> int:
    """Words that n tokens of a sequence take on a core, beside their logits and their decision."""
    states = sum(np.dtype(kind).itemsize // 4 for kind in _states(rule).values())
    return n * n_experts * (1 + _has_shares(rule)) + states * n_experts + _notes(rule) * -(-n * n_experts // 4) + WORK_ROWS * n_experts


def _initial(rule: RoutingRule, n: int, n_experts: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {name: ((n_experts,), kind) for name, kind in _states(rule).items()}
    shapes["scores"], shapes["work"] = ((n, n_experts), np.float32), ((WORK_ROWS, n_experts), np.float32)
    if _has_shares(rule):
        shapes["shares"] = ((n, n_experts), np.float32)
    if _notes(rule):
        shapes["tried"] = ((n, n_experts), np.int8)
    return shapes


def decide(
    rule: RoutingRule, code: RouterCode, groups: Sequence[int], given: Mapping[str, NDArray[Any]], ids: NDArray[np.int64],
    weights: NDArray[np.float32], scores: NDArray[np.float32], top_k: int,
) -> None:  # fmt: skip
    """Decide for all tokens, sequence by sequence.

    Parameters
    ----------
    rule : RoutingRule
    code : RouterCode
    groups : sequence of int
        Tokens of each sequence.
    given : mapping
        "logits" (T, n_experts), "bias" and "correction" (1, n_experts); the gate's bias is added to the logits in place.
    ids, weights : ndarray, (T, slots), int64 and float32
        Written.
    scores : ndarray, (T, n_experts), float32
        Written: scores for the choice.
    top_k : int
    """
    first, n_experts = 0, given["logits"].shape[1]
    for n in groups:
        mine = slice(first, first + n)
        made = {name: np.empty(shape, kind) for name, (shape, kind) in _initial(rule, n, n_experts).items()}
        if "bound" in made:
            made["bound"].fill(0)
        args: dict[str, Any] = {**given, **made, "topk_ids": ids[mine], "topk_weights": weights[mine]}
        args["logits"], args["scores"] = given["logits"][mine], scores[mine]
        for step in _steps(rule, code, n, n_experts, top_k):
            if step.state and step.start is not None:
                args[step.state].fill(step.start)
            given_now = {**args, "scores": args[step.scores], **step.scalars}
            step.kernel.body(*(given_now[name] for name in step.kernel.params))
        first += n



def place(borrow: Borrow, rule: RoutingRule, core: tuple[int, int], n: int, n_experts: int) -> dict[str, Block]:
    """What a core holds for n tokens of a sequence, beside logits, biases and decision."""
    blocks = {name: borrow(core, f"router {name}", shape, kind) for name, (shape, kind) in _initial(rule, n, n_experts).items()}
    if "bound" in blocks:
        blocks["bound"].write(0)
    return blocks


def decide_on_cores(
    cores: Cores, rule: RoutingRule, code: RouterCode, column: Sequence[Station], n_tokens: int, top_k: int, tally: dict[str, int],
    handed: Traffic, told: Traffic,
) -> int:  # fmt: skip
    """Decide for one sequence, whose tokens lie on the stations from the first to the last; returns the multiply-adds.

    `tally` counts runs of kernels, `handed` and `told` what moves down and up the column.
    """
    macs = 0
    n_experts = column[0].blocks["scores"].array.shape[1]
    for step in _steps(rule, code, n_tokens, n_experts, top_k):
        before: Block | None = None
        for station in column:
            if step.state:
                block: Block = station.blocks[step.state]
                if before is not None:
                    cores.send(handed, before, [block])
                elif step.start is not None:
                    block.write(step.start)
                before = block
            tally[step.kernel.name] = tally.get(step.kernel.name, 0) + 1
            blocks = {**station.blocks, "scores": station.blocks[step.scores], **step.scalars}
            macs += cores.run(step.kernel, station.core, blocks)
        if step.shared:
            assert before is not None
            cores.send(told, before, [station.blocks[step.state] for station in column[:-1]])
    return macs


def launches(tally: Mapping[str, int], macs: int = 0) -> tuple[Event, ...]:
    """Runs of kernels as events; all multiply-adds are the first one's."""
    return tuple(
        Event(None, "", "launch", name, count=count, macs=0 if i else macs) for i, (name, count) in enumerate(tally.items())
    )  # fmt: skip


def events(
    n_rows: int, rule: RoutingRule, rows: Sequence[Ints], columns: Sequence[int], n_experts: int, top_k: int, replicas: int
) -> tuple[Event, ...]:  # fmt: skip
    """What `decide_on_cores` does and moves, over all sequences.

    Parameters
    ----------
    n_rows : int
    rule : RoutingRule
    rows : sequence of ndarray
        For each sequence the rows of its cores, ascending, replicas left out.
    columns : sequence of int
        And their column.
    n_experts, top_k, replicas : int
        Each row of tokens is held by so many rows of cores, one below the other.
    """
    steps = list(_steps(rule, None, 1, n_experts, top_k))
    tally: dict[str, int] = {}
    for step in steps:
        tally[step.kernel.name] = tally.get(step.kernel.name, 0) + replicas * sum(r.size for r in rows)
    size = {name: np.dtype(kind).itemsize // 4 * n_experts for name, kind in _states(rule).items()}
    handed = sum(size[step.state] for step in steps if step.state)
    told = sum(size[step.state] for step in steps if step.shared)
    n_handed, n_told = sum(bool(step.state) for step in steps), sum(step.shared for step in steps)
    load = {col: costs.LineLoad(n_rows) for col in columns}
    several = [(r, col) for r, col in zip(rows, columns, strict=True) if r.size > 1]
    for r, col in several:
        for i in range(replicas):
            load[col].add(r[:1] + i, r[-1:] + i, np.ones(1, np.int64))
    busiest = max((line.busiest() for line in load.values()), default=0)
    spans = sum(int(r[-1] - r[0]) for r, _ in several) * replicas
    hands = sum(r.size - 1 for r, _ in several) * replicas
    gap = max((int(np.diff(r).max()) for r, _ in several), default=0)
    span = max((int(r[-1] - r[0]) for r, _ in several), default=0)
    n_several = len(several) * replicas
    return (
        *launches(tally),
        costs.moved(
            "chain", "routing", count=hands * n_handed, words=hands * handed, hops=spans * handed, max_link=busiest * handed,
            max_hops=gap if n_handed else 0,
        ),
        costs.moved(
            "broadcast", "routing", count=n_several * n_told, words=n_several * told, hops=spans * told, max_link=busiest * told,
            max_hops=span if n_told else 0,
        ),
    )  # fmt: skip


def moved(handed: Traffic, told: Traffic) -> tuple[Event, Event]:
    """What was handed down and told up, as events."""
    return (
        handed.event("chain", "routing", costs.COLORS["chain"]),
        told.event("broadcast", "routing", costs.COLORS["broadcast"]),
    )
