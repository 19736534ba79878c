"""Which experts each token visits: scores meet on one core of the token's row, which applies the routing rule and tells the row.

The core for a token is the one in column ``token index modulo columns``. Tokens never leave their row, and neither does the decision; only
the set of chosen experts goes to MemoryX, over the control channel. Where a rule lets the tokens of a sequence meet, it is the one in
column ``sequence index modulo columns``, and the cores of that column decide together (see `router_together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import TieError, TraceError
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers import router_together as together
from wse_emu.layers.linear import DEFAULT_CHUNK
from wse_emu.layers.norm import stream_vector
from wse_emu.layers.row_products import PARTIAL_MATMUL, RowProducts
from wse_emu.layers.stream import StreamedMatrix, StreamedVector
from wse_emu.wafer import costs
from wse_emu.wafer.cores import Block
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import CHAIN_ADD, CHAIN_OR
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels import routing as codes
from wse_kernels.matmul import STORE, mesh_matmul
from wse_kernels.routing import RouterCode, mark_chosen, route_tokens, softmax_topk
from wse_kernels.routing_together import score_tokens

SOFTMAX_TOPK = Kernel(
    body=softmax_topk,
    params=("logits", "renormalize", "probs", "topk_ids", "topk_weights"),
    out=("topk_ids", "topk_weights"),
    scratch=("probs",),
    code_bytes=512,
)
ROUTE_TOKENS = Kernel(
    body=route_tokens,
    params=("logits", "bias", "correction", "rule", "work", "topk_ids", "topk_weights"),
    inout=("logits",),
    out=("topk_ids", "topk_weights"),
    scratch=("work",),
    code_bytes=2560,
)
MARK_CHOSEN = Kernel(body=mark_chosen, params=("topk_ids", "mask"), out=("mask",), code_bytes=128)
_ID_WORDS = 2
_SHOWN = 8
"""Experts in one message."""


@dataclass(frozen=True)
class Routing:
    """Decision of one MoE layer."""

    ids: PlacedTensor
    """(T, top_k) int64, on every core of the token's row."""
    weights: PlacedTensor
    """(T, top_k) float32, likewise."""
    topk_ids: NDArray[np.int64]
    """(T, top_k) the same on the host, as bookkeeping: experts in descending order of probability."""
    topk_weights: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    """(T, n_experts), if asked for."""
    scores: NDArray[np.float32] | None = None
    """(T, n_experts) what is compared, if asked for and tokens meet."""

    def __enter__(self) -> Routing:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the SRAM back."""
        self.ids.free()
        self.weights.free()


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """What a router learned, on its way to the wafer."""

    gate: StreamedMatrix
    """(hidden, n_experts)."""
    bias: StreamedVector | None = None
    """(n_experts,) of the gate."""
    correction: StreamedVector | None = None
    """(n_experts,) added to scores for the choice."""


def router_code(rule: RoutingRule) -> RouterCode:
    """A rule as the kernel takes it."""
    scores = {"softmax": codes.SOFTMAX, "sigmoid": codes.SIGMOID, "sqrtsoftplus": codes.SQRTSOFTPLUS, "none": codes.LOGITS}
    scores["sinkhorn"] = codes.SINKHORN
    formats = {"float32": codes.FLOAT32, "bfloat16": codes.BFLOAT16, "float16": codes.FLOAT16, "cb16": codes.CB16}
    weights = {**scores, "softmax_topk": codes.SOFTMAX_TOPK, "sparsemixer": codes.SPARSEMIXER}
    return RouterCode(
        selection=scores[rule.router_selection_nonlinearity],
        weighting=weights[rule.expert_weighting_nonlinearity],
        n_group=rule.n_group,
        topk_group=rule.topk_group,
        top2_sum=int(rule.group_score == "top2_sum"),
        tie={"lowest_id": codes.LOWEST_ID, "highest_id": codes.HIGHEST_ID, "reject": codes.REJECT}[rule.tie_policy],
        stored_as=formats[rule.selection_dtype],
        rounds_logits=int(not rule.router_fp32),
        has_bias=int(rule.router_use_bias),
        has_correction=int(rule.e_score_correction_bias),
        normalizes=int(rule.expert_weighting_normalization),
        null_bias=np.float32(rule.null_expert_bias),
        epsilon=np.float32(rule.norm_epsilon),
        least=np.float32(rule.norm_min),
        scale=np.float32(rule.routed_scaling_factor),
        jitter=np.float32(2 * rule.router_jitter_noise),
    )


def is_plain(rule: RoutingRule) -> bool:
    """Whether `softmax_topk` is all that a rule asks for."""
    return rule == replace(RoutingRule(), expert_weighting_normalization=rule.expert_weighting_normalization)


def route(
    wafer: Wafer, x: PlacedTensor, router: RouterWeights, bands: TokenBands, top_k: int, rule: RoutingRule,
    *, groups: tuple[int, ...] = (), chunk: int = DEFAULT_CHUNK, probe: bool = False, replay: Ints | None = None,
    where: Callable[[int], str] = "token {} of this pass".format,
) -> Routing:  # fmt: skip
    """Choose experts by learned scores, as `rule` says.

    Biases stream down to every core on which scores meet. Every sum over experts runs over ascending ids; see `route_tokens`.

    Parameters
    ----------
    wafer : Wafer
    x : PlacedTensor, (T, hidden), float32
    router : RouterWeights
        With the biases that the rule asks for.
    bands : TokenBands
    top_k : int
    rule : RoutingRule
        Of algorithm "learned".
    groups : tuple of int
        Tokens of each sequence, where the rule lets them meet; else of no account.
    chunk : int
        Most experts of one streamed piece.
    probe : bool
        Also return the logits, through the probe channel.
    replay : ndarray, (T, top_k), int64, optional
        With the ``dry`` executor: the decision, from a recorded trace.
    where : callable
        What an error calls a token, by its index.

    Raises
    ------
    TraceError
        If the ``dry`` executor gets no decision, or one that is not for these tokens and experts.
    TieError
        If equal scores leave the set of a token's experts open, and the rule rejects that.
    """
    gate = router.gate
    n_tokens, n_experts = bands.n_tokens, gate.n_out
    rows = x.placement.axis0
    groups = groups if rule.tokens_meet else ()
    assert not rule.tokens_meet or sum(groups) == n_tokens
    slots = rule.slots(n_experts, top_k)
    place = wafer.placement((n_tokens, slots), rows, (None, None))
    found = _Found(
        np.zeros((n_tokens, n_experts), np.float32), np.zeros((n_tokens, slots), np.int64), np.zeros((n_tokens, slots), np.float32),
        np.zeros((n_tokens, n_experts) if rule.tokens_meet else (0, 0), np.float32), where,
    )  # fmt: skip
    program = route, x.placement, bands, gate.name, gate.n_bytes, n_experts, top_k, rule, groups, chunk
    with ExitStack() as kept:  # what outlives this call, unless it fails
        ids = kept.enter_context(wafer.empty("chosen experts", place, np.int64))
        weights = kept.enter_context(wafer.empty("expert weights", place))
        events = wafer.known_events(program)
        if events is None:
            with wafer.first_run(program):
                _whole_router(wafer, x, router, bands, top_k, rule, groups, chunk, replay, found, ids, weights)
        else:
            _decide_at_once(wafer, x, router, bands, top_k, rule, groups, replay, found, ids, weights)
            wafer.ledger.extend(events)
        kept.pop_all()
    logits, topk_ids, topk_weights, scores = found.logits, found.topk_ids, found.topk_weights, found.scores
    if not probe:
        return Routing(ids, weights, topk_ids, topk_weights, None)
    wafer.record(costs.moved("probe", "router logits", count=1, words=logits.size, hops=0, max_link=0, max_hops=0))
    if not rule.tokens_meet:
        return Routing(ids, weights, topk_ids, topk_weights, logits)
    wafer.record(costs.moved("probe", "router scores", count=1, words=scores.size, hops=0, max_link=0, max_hops=0))
    return Routing(ids, weights, topk_ids, topk_weights, logits, scores)


@dataclass(slots=True)
class _Found:
    """What a router computes, on the host."""

    logits: NDArray[np.float32]
    topk_ids: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    scores: NDArray[np.float32]
    where: Callable[[int], str]
    """What to call a token."""


def _whole_router(
    wafer: Wafer, x: PlacedTensor, router: RouterWeights, bands: TokenBands, top_k: int, rule: RoutingRule, groups: tuple[int, ...],
    chunk: int, replay: Ints | None, found: _Found, ids: PlacedTensor, weights: PlacedTensor,
) -> None:  # fmt: skip
    """Hold the work blocks and the code, stream the biases, decide, and write down what moved."""
    gate, rows = router.gate, x.placement.axis0
    n_tokens, n_experts = bands.n_tokens, router.gate.n_out
    decision = _Decision.of(rule)
    meeting_words = _meeting_words(bands, wafer.cols, groups, rule, n_experts, rule.slots(n_experts, top_k))
    slab_place = wafer.placement((gate.n_in, 2 * min(chunk, n_experts)), ("col", x.placement.axis1[1]), (None, None))
    part_place = wafer.placement(
        (n_tokens, wafer.cols * min(chunk, n_experts)), rows, ("col", Split.uniform(min(chunk, n_experts), wafer.cols))
    )
    code = together.code_bytes(rule, n_experts, top_k) if rule.tokens_meet else decision.kernel.code_bytes
    with (
        wafer.sram.reserved("router scores", np.ones(wafer.rows, np.int64), meeting_words, 4),
        _biases(wafer, router, bands, groups) as biases,
        wafer.empty("weight slabs", slab_place) as slab,
        wafer.empty("partial sums", part_place) as part,
        wafer.empty("incoming sums", part_place) as inbox,
        wafer.sram.code("router", PARTIAL_MATMUL.code_bytes + CHAIN_ADD.code_bytes + code),
    ):
        if wafer.cores is None:
            _decide_at_once(wafer, x, router, bands, top_k, rule, groups, replay, found, ids, weights)
            events = _events(wafer.rows, wafer.cols, x.placement.axis1[1], bands, n_experts, top_k, chunk, gate.name, rule, groups)
            events = (events[0]._replace(bytes=gate.bytes_of(events[0].wavelets)), *events[1:])
        else:
            events = _isolated(
                wafer, x, gate, bands, decision, biases, chunk, slab, part, inbox, ids, weights, found.logits, found.scores, top_k, groups
            )
            for row in bands.split.representatives.tolist():
                where = slice(int(bands.split.starts[row]), int(bands.split.stops[row]))
                found.topk_ids[where], found.topk_weights[where] = ids.block(row, 0), weights.block(row, 0)
            _refuse_ties(found, router, rule, top_k)
    for event in events:
        wafer.record(event)


def _decide_at_once(
    wafer: Wafer, x: PlacedTensor, router: RouterWeights, bands: TokenBands, top_k: int, rule: RoutingRule, groups: tuple[int, ...],
    replay: Ints | None, found: _Found, ids: PlacedTensor, weights: PlacedTensor,
) -> None:  # fmt: skip
    """The decision for all tokens, without cores of their own: computed, or taken from a recorded trace."""
    gate, n_tokens, n_experts = router.gate, bands.n_tokens, router.gate.n_out
    if wafer.is_dry:
        found.topk_ids = checked_replay(replay, n_tokens, n_experts, rule.slots(n_experts, top_k), may_lack=rule.has_capacity)
        return
    all_tokens = np.arange(n_tokens, dtype=np.int64)
    mesh_matmul(
        x.flat, n_tokens, x.placement.axis1[1].offsets, all_tokens, gate.values, 0, gate.n_in, n_experts,
        found.logits.reshape(-1), n_tokens, np.array([0, n_experts], np.int64), all_tokens, np.zeros(1, np.float32), STORE,
    )  # fmt: skip
    biases = [_NO_BIAS if v is None else np.array(v.values, np.float32).reshape(1, -1) for v in (router.bias, router.correction)]
    if rule.tokens_meet:
        given = {"logits": found.logits, "bias": biases[0], "correction": biases[1]}
        together.decide(rule, router_code(rule), groups, given, found.topk_ids, found.topk_weights, found.scores, top_k)
    else:
        _Decision.of(rule).decide(found.logits, biases, found.topk_ids, found.topk_weights)
    _refuse_ties(found, router, rule, top_k)
    ids.flat[...], weights.flat[...] = found.topk_ids.reshape(-1), found.topk_weights.reshape(-1)


def _meeting_words(bands: TokenBands, n_cols: int, groups: tuple[int, ...], rule: RoutingRule, n_experts: int, slots: int) -> Ints:
    """Words of every column's fullest core: scores that meet there, working memory and decisions."""
    if not groups:
        per_core = -(-bands.split.max_size // n_cols)
        return np.full(n_cols, _Decision.of(rule).words(per_core, n_experts, slots))
    row, col, n, _ = meeting_cores(bands, n_cols, groups)
    words = np.zeros((bands.n_rows, n_cols), np.int64)
    for r, c, k in zip(row.tolist(), col.tolist(), n.tolist(), strict=True):
        words[r, c] += k * (n_experts + slots * (_ID_WORDS + 1)) + together.words(rule, k, n_experts)
    most: Ints = words.max(axis=0)
    return most


@dataclass(frozen=True, slots=True)
class _Decision:
    """The kernel that decides under a rule, with its scratch and its scalars."""

    rule: RoutingRule
    kernel: Kernel
    scalars: Mapping[str, Any]
    """Arguments that are no blocks."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(rule: RoutingRule) -> _Decision:
        """What decides under `rule`."""
        if is_plain(rule):
            return _Decision(rule, SOFTMAX_TOPK, {"renormalize": rule.expert_weighting_normalization})
        return _Decision(rule, ROUTE_TOKENS, {"rule": router_code(rule)})

    @property
    def is_plain(self) -> bool:
        """Whether it is `softmax_topk`."""
        return self.kernel is SOFTMAX_TOPK

    def scratch(self, n: int, n_experts: int) -> tuple[str, tuple[int, int]]:
        """Name and shape of the working memory for n tokens."""
        return ("probs", (n, n_experts)) if self.is_plain else ("work", (codes.WORK_ROWS, n_experts))

    def words(self, n: int, n_experts: int, top_k: int) -> int:
        """Words on a core on which n tokens meet: scores, working memory and the decision."""
        rows, columns = self.scratch(n, n_experts)[1]
        return n * (n_experts + top_k * (_ID_WORDS + 1)) + rows * columns

    def args(self, biases: Sequence[Any]) -> dict[str, Any]:
        """Arguments but for scores, working memory and results."""
        return {**self.scalars} if self.is_plain else {**self.scalars, "bias": biases[0], "correction": biases[1]}

    def decide(
        self, logits: NDArray[np.float32], biases: Sequence[NDArray[np.float32]], ids: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> None:
        """Decide for all tokens at once; biases (1, n_experts)."""
        name, shape = self.scratch(*logits.shape)
        args = self.args(biases)
        args |= {"logits": logits, name: np.empty(shape, np.float32), "topk_ids": ids, "topk_weights": weights}
        self.kernel.body(*(args[p] for p in self.kernel.params))


_NO_BIAS = np.zeros((1, 1), np.float32)
"""Stands for a bias that is not read."""


@contextmanager
def _biases(
    wafer: Wafer, router: RouterWeights, bands: TokenBands, groups: tuple[int, ...]
) -> Iterator[tuple[PlacedTensor | None, PlacedTensor | None]]:
    """The gate's bias and the correction bias, whole on every column on which tokens meet."""
    if router.bias is None and router.correction is None:
        yield None, None
        return
    n_experts = router.gate.n_out
    meets = np.arange(wafer.cols) < (len(groups) or bands.n_tokens)
    everywhere = Split(n_experts, np.zeros(wafer.cols, np.int64), np.where(meets, n_experts, 0))
    with ExitStack() as stack:
        placed = [
            None if v is None else stack.enter_context(stream_vector(wafer, v.name, v.values, everywhere, bands))
            for v in (router.bias, router.correction)
        ]
        yield placed[0], placed[1]


def _refuse_ties(found: _Found, router: RouterWeights, rule: RoutingRule, top_k: int) -> None:
    tied = np.flatnonzero(found.topk_ids[:, 0] == codes.TIED)
    if tied.size:
        token = int(tied[0])
        what = _tie(found.logits[token], _compared(found, token, router, rule), rule, top_k)
        raise TieError(f"{found.where(token)}: {what}; `tie_policy` is 'reject': name 'lowest_id' or 'highest_id'")


def _compared(found: _Found, token: int, router: RouterWeights, rule: RoutingRule) -> NDArray[np.float32]:
    """Scores for the choice of one token, (n_experts,), as the cores have them."""
    if rule.tokens_meet:
        row: NDArray[np.float32] = found.scores[token]
        return row
    logits = found.logits[token : token + 1].copy()  # with the gate's bias
    scores = np.empty_like(logits)
    correction = _NO_BIAS if router.correction is None else np.array(router.correction.values, np.float32).reshape(1, -1)
    score_tokens(logits, _NO_BIAS, correction, router_code(rule)._replace(has_bias=0), scores)
    return scores.reshape(-1)


def _tie(logits: NDArray[np.float32], scores: NDArray[np.float32], rule: RoutingRule, top_k: int) -> str:
    """Which groups, or which experts, one token cannot choose between."""
    size = scores.size // rule.n_group
    is_open = np.ones(scores.size, np.bool_)
    if rule.topk_group < rule.n_group:
        best = -np.sort(-scores.reshape(rule.n_group, size), axis=1)
        groups = best[:, 0] + best[:, 1] if rule.group_score == "top2_sum" else best[:, 0]
        alike, n_left = _alike(groups, rule.topk_group)
        if alike.size > n_left:
            return f"groups {_few(alike)} of {size} experts each score {groups[alike[0]]} alike, and {n_left} of them may be open"
        opened = np.argsort(-groups, kind="stable")[: rule.topk_group]
        is_open = np.isin(np.arange(scores.size) // size, opened)
    alike, n_left = _alike(np.where(is_open, scores, -np.inf), top_k)
    return (
        f"experts {_few(alike)} score {scores[alike[0]]} alike (logits {_few(logits[alike])}), and {n_left} of them "
        f"{'is' if n_left == 1 else 'are'} to be among the {top_k} that are chosen"
    )


def _alike(values: NDArray[np.float32], k: int) -> tuple[Ints, int]:
    """Which values equal the k-th highest, and how many of them are among the k highest."""
    last = -np.sort(-values)[k - 1]
    return np.flatnonzero(values == last), k - int((values > last).sum())


def _few(values: NDArray[Any]) -> str:
    """The first of some numbers."""
    return str(values[:_SHOWN].tolist()) + (f" and {values.size - _SHOWN} more" if values.size > _SHOWN else "")


def checked_replay(
    replay: NDArray[np.int64] | None, n_tokens: int, n_experts: int, top_k: int, *, may_lack: bool = False
) -> NDArray[np.int64]:
    """The recorded decision, if it is one for these tokens and experts; with `may_lack` a token may have fewer than `top_k`."""
    if replay is None:
        raise TraceError("the `dry` executor needs a routing trace: it computes no scores")
    if replay.shape != (n_tokens, top_k):
        raise TraceError(f"routing trace: expected ids of shape {(n_tokens, top_k)}, got {replay.shape}")
    lacks = may_lack & (replay == codes.NOBODY)
    ids = np.sort(replay, axis=1)
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    bad = ((replay < 0) & ~lacks).any(axis=1) | (ids[:, -1] >= n_experts) | twice.any(axis=1)
    bad |= (lacks[:, :-1] & ~lacks[:, 1:]).any(axis=1)  # slots of nobody come last
    for token in np.flatnonzero(bad).tolist():
        raise TraceError(f"routing trace: token {token} chose {replay[token].tolist()}; expected different experts in 0..{n_experts - 1}")
    return replay.astype(np.int64, copy=False)


def meeting_columns(n_tokens: int, n_cols: int, groups: tuple[int, ...]) -> tuple[Ints, Ints]:
    """Column of cores on which each token's scores meet, and its sequence where tokens meet (else 0)."""
    if not groups:
        return np.arange(n_tokens) % n_cols, np.zeros(n_tokens, np.int64)
    sequence = np.repeat(np.arange(len(groups)), groups)
    return sequence % n_cols, sequence


def meeting_cores(bands: TokenBands, n_cols: int, groups: tuple[int, ...] = ()) -> tuple[Ints, Ints, Ints, Ints]:
    """(row, column, tokens, sequence) of every core on which tokens' scores meet, replicas once; by row, then by column or sequence."""
    column, sequence = meeting_columns(bands.n_tokens, n_cols, groups)
    base = max(len(groups), 1) if groups else n_cols
    cores, first, counts = np.unique(
        bands.split.owner * base + (sequence if groups else column), return_index=True, return_counts=True
    )  # fmt: skip
    return cores // base, column[first], counts, sequence[first]


def told_event(n_rows: int, n_cols: int, bands: TokenBands, top_k: int, groups: tuple[int, ...] = ()) -> Event:
    """Every meeting core tells its decision to its row: ids and weights, a message each."""
    row, col, n, _ = meeting_cores(bands, n_cols, groups)
    ends = np.zeros((2, n_rows), np.int64)
    np.add.at(ends[0], row[col > 0], n[col > 0])
    np.add.at(ends[1], row[col < n_cols - 1], n[col < n_cols - 1])
    words, replicas = top_k * (_ID_WORDS + 1), bands.n_feature_bands
    spread = n_cols > 1
    return costs.moved(
        "broadcast", "routing", count=2 * int(row.size) * replicas if spread else 0,
        words=bands.n_tokens * words * replicas if spread else 0, hops=bands.n_tokens * words * replicas * (n_cols - 1),
        max_link=int(ends.max(initial=0)) * words, max_hops=int(np.maximum(col, n_cols - 1 - col).max()),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _events(
    n_rows: int, n_cols: int, k_split: Split, bands: TokenBands, n_experts: int, top_k: int, chunk: int, name: str, rule: RoutingRule,
    groups: tuple[int, ...],
) -> tuple[Event, ...]:  # fmt: skip
    stations, source, n_in = k_split.used, int(k_split.used[-1]), k_split.total
    n_pieces = -(-n_experts // chunk)
    used, replicas = bands.used_rows, bands.n_feature_bands
    last_row = used - 1
    row_words = bands.split.sizes[:used] * n_experts
    row, col, n, sequence = meeting_cores(bands, n_cols, groups)
    decides: tuple[Event, ...] = (Event(None, "", "launch", _Decision.of(rule).kernel.name, count=int(row.size) * replicas),)
    if groups:
        each = [row[sequence == s] for s in range(len(groups))]
        columns = [s % n_cols for s in range(len(groups))]
        decides = together.events(n_rows, rule, each, columns, n_experts, top_k, replicas)
    away = col != source
    side = np.zeros((2, n_rows), np.int64)
    np.add.at(side[0], row[col < source], n[col < source])
    np.add.at(side[1], row[col > source], n[col > source])
    runs = used * stations.size * n_pieces
    return (
        costs.moved(
            "stream", name, count=n_pieces * stations.size, words=n_in * n_experts, hops=n_in * n_experts * last_row,
            max_link=k_split.max_size * n_experts if last_row else 0, max_hops=last_row,
        ),
        Event(None, "", "launch", PARTIAL_MATMUL.name, count=runs, macs=n_in * int(row_words.sum())),
        costs.chain(name, row_words, stations, messages=n_pieces),
        Event(None, "", "launch", CHAIN_ADD.name, count=used * (stations.size - 1) * n_pieces),
        costs.moved(
            "deliver", name, count=int(away.sum()) * n_pieces * replicas, words=int(n[away].sum()) * n_experts * replicas,
            hops=int((n * np.abs(col - source)).sum()) * n_experts * replicas, max_link=int(side.max(initial=0)) * n_experts,
            max_hops=int(np.abs(col - source).max()),
        ),
        *decides,
        told_event(n_rows, n_cols, bands, rule.slots(n_experts, top_k), groups),
    )  # fmt: skip


def _isolated(
    wafer: Wafer, x: PlacedTensor, gate: StreamedMatrix, bands: TokenBands, decision: _Decision, biases: Sequence[PlacedTensor | None],
    chunk: int, slab: PlacedTensor, part: PlacedTensor, inbox: PlacedTensor, ids: PlacedTensor, weights: PlacedTensor,
    logits_out: NDArray[np.float32], scores_out: NDArray[np.float32], top_k: int, groups: tuple[int, ...],
) -> tuple[Event, ...]:  # fmt: skip
    cores = wafer.cores
    assert cores is not None
    n_experts, slots, rule = gate.n_out, ids.placement.shape[1], decision.rule
    column_of, sequence_of = meeting_columns(bands.n_tokens, wafer.cols, groups)
    products, told = RowProducts(cores, gate, x, slab, part, inbox), cores.traffic()
    handed, shared, tally, macs = cores.traffic(), cores.traffic(), dict[str, int](), 0
    decided: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    rows = range(bands.used_rows)
    with cores.borrowing() as borrow:
        meeting: dict[tuple[int, int, int], tuple[Block, Ints]] = {}  # by row, column and sequence
        for row in rows:
            of_row = slice(int(bands.split.starts[row]), int(bands.split.stops[row]))
            for col, s in dict.fromkeys(zip(column_of[of_row].tolist(), sequence_of[of_row].tolist(), strict=True)):
                mine = np.flatnonzero((column_of[of_row] == col) & (sequence_of[of_row] == s))
                meeting[row, col, s] = (borrow((row, col), "router logits", (mine.size, n_experts), np.float32), mine)
        for first in range(0, n_experts, chunk):
            n = min(chunk, n_experts - first)
            products.stream(gate.columns(first, first + n), rows)
            for row in rows:
                all_rows = np.arange(bands.split.sizes[row], dtype=np.int64)
                acc = products.product(row, all_rows.size, partial(_constant, all_rows), compact=False)
                for where, (scores, mine) in meeting.items():
                    if where[0] == row:
                        products.hand(acc, scores, (slice(None), slice(first, first + n)), (mine, slice(None)))
        stations: dict[tuple[int, int], list[together.Station]] = {}  # by sequence and replica, top down
        for (row, col, s), (scores, mine) in meeting.items():
            core = (row, col)
            made = borrow(core, "decision", (mine.size, slots), np.int64), borrow(core, "weights", (mine.size, slots), np.float32)
            given = [_NO_BIAS if b is None else b.held[core] for b in biases]
            blocks: dict[str, Any] = {"logits": scores, "topk_ids": made[0], "topk_weights": made[1]}
            if groups:
                blocks |= {"bias": given[0], "correction": given[1], **together.place(borrow, rule, core, mine.size, n_experts)}
                stations.setdefault((s, row % bands.n_feature_bands), []).append(together.Station(core, blocks))
                continue
            scratch, shape = decision.scratch(mine.size, n_experts)
            blocks[scratch] = borrow(core, "router work", shape, np.float32)
            macs += cores.run(decision.kernel, core, {**decision.args(given), **blocks})
            tally[decision.kernel.name] = tally.get(decision.kernel.name, 0) + 1
            decided[row, col, s] = blocks
        for (s, _), column in sorted(stations.items()):
            macs += together.decide_on_cores(cores, rule, router_code(rule), column, groups[s], top_k, tally, handed, shared)
            decided.update(((*station.core, s), station.blocks) for station in column)
        for (row, col, s), (scores, mine) in meeting.items():
            to, result = (mine, slice(None)), decided[row, col, s]
            for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
                tensor.held[row, col].write(result[name].read(), to)
                cores.send(told, result[name], [tensor.held[row, c] for c in range(wafer.cols) if c != col], to=to)
            logits_out[bands.split.starts[row] + mine] = scores.read()
            if groups:
                scores_out[bands.split.starts[row] + mine] = result["scores"].read()
    return (
        *products.events(),
        *together.launches(tally, macs),
        *(together.moved(handed, shared) if groups else ()),
        told.event("broadcast", "routing", costs.COLORS["broadcast"]),
    )


def _constant(rows: Ints, _col: int) -> Ints:
    return rows


def report_chosen(wafer: Wafer, routing: Routing, bands: TokenBands, n_experts: int) -> Ints:
    """Tell MemoryX which experts any token chose: bit sets merged down the first column of cores, out at the north edge.

    Returns
    -------
    ndarray of int64
        Chosen experts, ascending.
    """
    program = report_chosen, bands, n_experts
    events = wafer.known_events(program)
    if events is not None:
        wafer.ledger.extend(events)
        return _chosen(routing)
    with wafer.first_run(program):
        return _report_whole(wafer, routing, bands, n_experts)


def _chosen(routing: Routing) -> Ints:
    return np.unique(routing.topk_ids[routing.topk_ids != codes.NOBODY]).astype(np.int64)


def _report_whole(wafer: Wafer, routing: Routing, bands: TokenBands, n_experts: int) -> Ints:
    n_words = -(-n_experts // 32)
    used = bands.used_rows
    ends = np.zeros(wafer.cols, np.int64)
    ends[0] = 2 * n_words
    with (
        wafer.sram.reserved("chosen set", np.ones(wafer.rows, np.int64), ends, 4),
        wafer.sram.code("chosen set", MARK_CHOSEN.code_bytes + CHAIN_OR.code_bytes),
    ):
        if wafer.cores is None:
            events = [
                Event(None, "", "launch", MARK_CHOSEN.name, count=used),
                costs.chain("chosen experts", np.array([n_words]), np.arange(used), kind="control"),
                Event(None, "", "launch", CHAIN_OR.name, count=used - 1),
                costs.moved(
                    "control", "chosen experts", count=1, words=n_words, hops=n_words * (used - 1), max_link=n_words if used > 1 else 0,
                    max_hops=used - 1,
                ),
            ]  # fmt: skip
            chosen = _chosen(routing)
        else:
            events, mask = _merge_isolated(wafer, routing, used, n_words)
            chosen = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:n_experts]).astype(np.int64)
    for event in events:
        wafer.record(event)
    return chosen


def _merge_isolated(wafer: Wafer, routing: Routing, used: int, n_words: int) -> tuple[list[Event], NDArray[np.int32]]:
    cores = wafer.cores
    assert cores is not None
    merging, leaving = cores.traffic(), cores.traffic()
    with cores.borrowing() as borrow:
        before: Block | None = None
        for row in range(used):
            mask = borrow((row, 0), "chosen set", (n_words,), np.int32)
            cores.run(MARK_CHOSEN, (row, 0), {"topk_ids": routing.ids.held[row, 0], "mask": mask})
            if before is not None:
                come = borrow((row, 0), "incoming set", (n_words,), np.int32)
                cores.send(merging, before, [come])
                cores.run(CHAIN_OR, (row, 0), {"mask": mask, "other": come})
            before = mask
        assert before is not None
        result = cores.to_edge(leaving, before)
    events = [
        Event(None, "", "launch", MARK_CHOSEN.name, count=used),
        merging.event("control", "chosen experts", costs.COLORS["control"]),
        Event(None, "", "launch", CHAIN_OR.name, count=used - 1),
        leaving.event("control", "chosen experts", costs.COLORS["control"]),
    ]
    return events, result
