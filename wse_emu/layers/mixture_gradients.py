"""Gradients of one mixture of experts, on the kernels: what a layer's backward pass is made of, on the blocks of one core.

Of the forward pass it needs the input, the logits and the decision; hidden layers are computed again. Nothing here moves over the fabric:
it is the definition that a mesh program of the backward pass will be held to, in which every sum has its order.

* Input: the shared experts' part, then the experts' in ascending order, then the router's, each a finished product (outputs ascending, with
  fma, from +0) that is added.
* Weights and biases: token by token, ascending, with fma, from what is there. So pieces of a batch, one after the other, give the bits of
  the whole batch.
* Weight of an expert: over the hidden layer ascending, then over the output bias.

An expert that no token chose gets exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.activations import Activation
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.errors import InputError, SpecError
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.layers.ffn import MoeImplementation
from wse_emu.layers.router import router_code
from wse_kernels import routing as codes
from wse_kernels.elementwise import add_bias
from wse_kernels.errors import check_arrays
from wse_kernels.exp import sigmoid_array
from wse_kernels.ffn import clamped_glu, combine_into, geglu_into, scale_rows, swiglu_into
from wse_kernels.ffn_backward import (
    add_bias_products,
    add_column_sums,
    add_weight_gradient,
    clamped_glu_backward,
    geglu_backward,
    keep_rows,
    put_in_slots,
    row_products,
    sigmoid_backward,
    swiglu_backward,
)
from wse_kernels.matmul import partial_matmul
from wse_kernels.routing import NOBODY, group_tokens, select_expert
from wse_kernels.routing_backward import BACKWARD_ROWS, UNCOUNTED, add_balance_backward, route_tokens_backward

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Network:
    """Weights of one feed-forward network, or their gradients; float32, as they stream in the forward pass."""

    gate_up: F32
    """(hidden, 2 * ffn), gate and up columns alternating."""
    down: F32
    """(ffn, hidden)."""
    b_gate_up: F32 | None = None
    """(1, 2 * ffn), alternating likewise; of a clamped expert."""
    b_down: F32 | None = None
    """(1, hidden)."""

    def zeros(self) -> Network:
        """As many zeros: where sums of gradients begin."""
        return Network(_zeros(self.gate_up), _zeros(self.down), _zeros_of(self.b_gate_up), _zeros_of(self.b_down))

    def arrays(self) -> dict[str, F32]:
        """All arrays by name."""
        named = {"gate_up": self.gate_up, "down": self.down, "b_gate_up": self.b_gate_up, "b_down": self.b_down}
        return {name: array for name, array in named.items() if array is not None}


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weights of one layer's mixture, or their gradients."""

    experts: tuple[Network, ...]
    router: F32 | None = None
    """(hidden, n_experts); None where routing is not learned."""
    router_bias: F32 | None = None
    """(1, n_experts)."""
    shared: Network | None = None
    """Shared experts, as one network."""
    shared_gate: F32 | None = None
    """(hidden, 1)."""

    def zeros(self) -> Mixture:
        """As many zeros."""
        shared = None if self.shared is None else self.shared.zeros()
        experts = tuple(expert.zeros() for expert in self.experts)
        return Mixture(experts, _zeros_of(self.router), _zeros_of(self.router_bias), shared, _zeros_of(self.shared_gate))

    def arrays(self) -> dict[str, F32]:
        """All arrays by name, ``experts.0.gate_up`` and so on."""
        named = {"router": self.router, "router_bias": self.router_bias, "shared_gate": self.shared_gate}
        networks = {f"experts.{i}": expert for i, expert in enumerate(self.experts)}
        if self.shared is not None:
            networks["shared"] = self.shared
        return {name: array for name, array in named.items() if array is not None} | {
            f"{network}.{name}": array for network, one in networks.items() for name, array in one.arrays().items()
        }


def _zeros(array: F32) -> F32:
    return np.zeros(array.shape, np.float32)


def _zeros_of(array: F32 | None) -> F32 | None:
    return None if array is None else _zeros(array)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a mixture computes, beside its weights."""

    routing: RoutingRule = field(default_factory=RoutingRule)
    activation: Activation = "silu"
    clamped: ClampedExperts | None = None
    """In place of `activation`, for the experts that are not shared."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router decided in the forward pass."""

    topk_ids: I64
    """(T, slots); -1 is nobody, in a token's last slots."""
    topk_weights: F32
    """(T, slots)."""
    logits: F32 | None = None
    """(T, n_experts), with the router's bias; None where routing is not learned."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A loss for even use of experts, as it enters the gradient of one layer."""

    sequence: I64
    """(T,) sequence of each token, -1 for one that does not count."""
    d_scores: F32
    """(n_sequences, n_experts) gradient of every expert's score, the coefficient included; see `balance_gradient`."""


@dataclass(frozen=True, slots=True)
class MixtureGradients:
    """Gradients of a mixture."""

    x: F32
    """(T, hidden) of its input."""
    topk_weights: F32
    """(T, slots) of the experts' weights; 0 in slots of nobody."""
    logits: F32 | None
    """(T, n_experts) of the router's logits."""
    weights: Mixture
    """Of the weights."""


def mixture_gradients(
    x: F32, weights: Mixture, rules: Rules, decision: Decision, d_out: F32, *, balance: Balance | None = None,
    implementation: MoeImplementation = "experimental", into: Mixture | None = None,
) -> MixtureGradients:  # fmt: skip
    """Gradients of a mixture from that of its output.

    Parameters
    ----------
    x, d_out : ndarray, (T, hidden), float32
        Input of the mixture, and the gradient of its output.
    weights : Mixture
    rules : Rules
    decision : Decision
        Of the forward pass; the choice is held as it is, and has no gradient.
    balance : Balance, optional
        Added to the gradient of the logits.
    implementation : {"functional", "experimental", "optimized"}
        Every expert computes every token, and what was not chosen is masked; or, expert by expert, its tokens are searched for; or tokens
        are sorted by expert once. The same numbers, bit by bit (of finite values).
    into : Mixture, optional
        Gradients of weights to go on from, changed and returned; zeros by default.

    Returns
    -------
    MixtureGradients

    Raises
    ------
    InputError
        If the decision names an expert that there is not or names one twice for a token, or lacks logits that the rule asks for.
    SpecError
        If `probability_before_ffn` is asked of "functional", or even use of sinkhorn.
    ShapeError, DTypeError
        If shapes do not fit each other, or an array is not float32 (ids: int64).
    """
    _check(x, weights, rules, decision, d_out, implementation, into)
    found = weights.zeros() if into is None else into
    dx, d_share = np.zeros_like(x), np.zeros_like(decision.topk_weights)
    if weights.shared is not None:
        _shared(x, weights, rules, d_out, found, dx)
    if implementation == "functional":
        _mask_every_token(x, weights, rules, decision, d_out, found, dx, d_share)
    else:
        _visited(x, weights, rules, decision, d_out, found, dx, d_share, sorted_once=implementation == "optimized")
    d_logits = None
    if decision.logits is not None:
        d_logits = logits_gradient(decision, rules.routing, d_share, balance)
        assert weights.router is not None
        assert found.router is not None
        add_weight_gradient(x, _all(x), d_logits, found.router)
        if found.router_bias is not None:
            add_column_sums(d_logits, found.router_bias)
        _add(_transposed_product(d_logits, weights.router), dx)
    return MixtureGradients(dx, d_share, d_logits, found)


def logits_gradient(decision: Decision, rule: RoutingRule, d_weights: F32, balance: Balance | None = None) -> F32:
    """Gradient of the router's logits, (T, n_experts), from that of the experts' weights, (T, slots), and of a loss for their even use.

    Raises
    ------
    SpecError
        If a loss for even use is given and sinkhorn chooses.
    """
    assert decision.logits is not None
    n_experts = decision.logits.shape[1]
    code, work = router_code(rule), np.empty((BACKWARD_ROWS, n_experts), np.float32)
    out = np.empty_like(decision.logits)
    route_tokens_backward(decision.logits, decision.topk_ids, d_weights, code, work, out)
    if balance is not None:
        _check_balance(balance, out.shape)
        add_balance_backward(decision.logits, balance.sequence, balance.d_scores, balance_scores(rule), code, work, out)
    return out


def balance_scores(rule: RoutingRule) -> int:
    """Kind of the scores whose even use a loss asks for: those that choose; their softmax where logits do, as transformers has it.

    Raises
    ------
    SpecError
        With sinkhorn, which balances by itself and has no gradient.
    """
    kind = rule.router_selection_nonlinearity
    if kind == "sinkhorn":
        raise SpecError("a loss for even use of experts does not go with `router_selection_nonlinearity` 'sinkhorn': it has no gradient")
    return {"softmax": codes.SOFTMAX, "none": codes.SOFTMAX, "sigmoid": codes.SIGMOID, "sqrtsoftplus": codes.SQRTSOFTPLUS}[kind]


def balance_gradient(counts: I64, tokens: I64, coef: float, *, over: str = "sequence") -> F32:
    """Gradient of ``coef * loss`` by every expert's score, from the counts of visits; rounded once.

    Parameters
    ----------
    counts : ndarray, (layers, n_sequences, n_experts), int64
        Visits, from `count_visits`.
    tokens : ndarray, (n_sequences,), int64
        Tokens that count, at least one.
    coef : float
    over : {"sequence", "batch"}
        `load_balancing_loss`, or `batch_load_balancing_loss` (which on several wafers needs the counts of all of them).

    Returns
    -------
    ndarray, (layers, n_sequences, n_experts), float32
        For `Balance.d_scores`, layer by layer; with "sequence" the same in all of them.
    """
    if over not in ("sequence", "batch"):
        raise InputError(f"`over` must be 'sequence' or 'batch', got {over!r}")
    n_layers, n_sequences, n_experts = counts.shape
    visits = counts / tokens[:, None]
    if over == "sequence":
        used = np.broadcast_to(visits.mean(axis=0), counts.shape) / n_layers
    else:
        used = visits.mean(axis=1, keepdims=True)
        used = used / used.sum(axis=2, keepdims=True)
    out: F32 = (coef * n_experts / n_sequences * used / tokens[:, None]).astype(np.float32)
    return out


def _check(x: F32, weights: Mixture, rules: Rules, decision: Decision, d_out: F32, implementation: str, into: Mixture | None) -> None:
    """Shapes and types, and what belongs together."""
    if implementation not in get_args(MoeImplementation):
        raise InputError(f"`implementation` must be one of {', '.join(get_args(MoeImplementation))}, got {implementation!r}")
    if implementation == "functional" and rules.routing.probability_before_ffn:
        raise SpecError("`probability_before_ffn` weighs an expert's input: not with 'functional', which computes all tokens unweighted")
    learned = rules.routing.is_learned
    if (decision.logits is None) == learned or (weights.router is None) == learned:
        raise InputError(
            "`logits` and `router` must be given with `routing_algorithm` 'learned', and only then; "
            f"the rule is {rules.routing.routing_algorithm!r}"
        )
    axes = {
        "gate_up": "hidden twice_ffn", "down": "ffn hidden", "b_gate_up": "1 twice_ffn", "b_down": "1 hidden", "router": "hidden experts",
        "router_bias": "1 experts", "shared_gate": "hidden 1", "shared.gate_up": "hidden twice_shared", "shared.down": "shared hidden",
    }  # fmt: skip
    given = {"x": (x, "tokens hidden"), "d_out": (d_out, "tokens hidden"), "topk_weights": (decision.topk_weights, "tokens slots")}
    if decision.logits is not None:
        given["logits"] = decision.logits, "tokens experts"
    arrays = weights.arrays()
    lengths = check_arrays(np.float32, **given, **{k: (a, axes.get(k) or axes[k.rpartition(".")[2]]) for k, a in arrays.items()})
    check_arrays(np.int64, topk_ids=(decision.topk_ids, f"{len(x)} {lengths['slots']}"))
    for width in ("ffn", "shared"):
        if lengths.get(f"twice_{width}") != (2 * lengths[width] if width in lengths else None):
            raise InputError(f"`gate_up` must have 2 * {lengths[width]} columns, as `down` has rows, got {lengths[f'twice_{width}']}")
    n_experts = len(weights.experts)
    if lengths.get("experts", n_experts) != n_experts:
        raise InputError(f"`router` must have a column for each of {n_experts} experts, got {lengths['experts']}")
    if {bias is not None for expert in weights.experts for bias in (expert.b_gate_up, expert.b_down)} != {rules.clamped is not None}:
        raise InputError("`b_gate_up` and `b_down` of all experts belong to `clamped`: give all or none")
    if into is not None and {k: a.shape for k, a in into.arrays().items()} != {k: a.shape for k, a in arrays.items()}:
        raise InputError("`into` must have the arrays and shapes of `weights`: take what an earlier call returned")
    _check_ids(decision.topk_ids, n_experts)


def _check_ids(topk_ids: I64, n_experts: int) -> None:
    """Kernels use ids as indices: none may lie outside, none stand twice, and nobody only at the end."""
    ordered = np.sort(topk_ids, axis=1)
    if topk_ids.size and not (ordered[:, 0].min() >= NOBODY and ordered[:, -1].max() < n_experts):
        raise InputError(f"`topk_ids` must lie in -1..{n_experts - 1}, got {ordered[:, 0].min()}..{ordered[:, -1].max()}")
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NOBODY)).any():
        raise InputError("`topk_ids` must name an expert at most once for a token")
    if ((topk_ids[:, 1:] != NOBODY) & (topk_ids[:, :-1] == NOBODY)).any():
        raise InputError("`topk_ids` must have nobody (-1) in a token's last slots only")


def _check_balance(balance: Balance, shape: tuple[int, ...]) -> None:
    """The same for sequences."""
    check_arrays(np.float32, d_scores=(balance.d_scores, f"sequences {shape[1]}"))
    check_arrays(np.int64, sequence=(balance.sequence, f"{shape[0]}"))
    low, high = balance.sequence.min(initial=UNCOUNTED), balance.sequence.max(initial=UNCOUNTED)
    if low < UNCOUNTED or high >= len(balance.d_scores):
        raise InputError(f"`sequence` must lie in -1..{len(balance.d_scores) - 1}, got {low}..{high}")


def _all(x: F32) -> I64:
    """Every row."""
    return np.arange(len(x))


def _product(x: F32, w: F32) -> F32:
    """``x @ w``: inputs ascending, with fma, from +0."""
    out = np.empty((len(x), w.shape[1]), np.float32)
    partial_matmul(x, _all(x), w, out)
    return out


def _transposed_product(dy: F32, w: F32) -> F32:
    """``dy @ w.T``: the weights as they stream a second time, (out, in)."""
    return _product(dy, np.ascontiguousarray(w.T))


def _add(y: F32, out: F32) -> None:
    """``out += y``."""
    combine_into(y, _all(y), np.ones(len(y), np.float32), 0, out)


def _taken(x: F32, rows: I64, scale: F32 | None = None) -> F32:
    """Rows of `x`, times their factors."""
    out = np.empty((len(rows), x.shape[1]), np.float32)
    scale_rows(x, rows, np.ones(len(rows), np.float32) if scale is None else scale, out)
    return out


def _shared(x: F32, weights: Mixture, rules: Rules, d_out: F32, found: Mixture, dx: F32) -> None:
    """The shared experts' part, a network that all tokens visit with weight 1, or with that of its gate."""
    assert weights.shared is not None
    assert found.shared is not None
    of_network = _Backward(weights.shared, found.shared, rules.activation, None)
    scale = np.ones(len(x), np.float32)
    if weights.shared_gate is not None:
        logit = _product(x, weights.shared_gate)
        sigmoid_array(logit[:, 0].copy(), scale)
    of_network.hidden(x, d_out)
    if weights.shared_gate is not None:
        assert found.shared_gate is not None
        d_logit = np.empty_like(logit)
        sigmoid_backward(logit, of_network.d_scale(), d_logit)
        add_weight_gradient(x, _all(x), d_logit, found.shared_gate)
        _add(of_network.input(scale), dx)
        _add(_transposed_product(d_logit, weights.shared_gate), dx)
    else:
        _add(of_network.input(scale), dx)


class _Backward:
    """One network and its tokens: `hidden`, then `d_scale` and `input`."""

    def __init__(self, weights: Network, found: Network, activation: Activation, clamped: ClampedExperts | None) -> None:
        self._weights, self._found, self._activation, self._clamped = weights, found, activation, clamped

    def hidden(self, x: F32, d_out: F32) -> None:
        """The hidden layer of tokens `x` again, and its gradient before weights; both (m, hidden)."""
        self._x, self._d_out = x, d_out
        self._y = _product(x, self._weights.gate_up)
        self._h = np.empty((len(x), self._weights.down.shape[0]), np.float32)
        if self._clamped is not None:
            assert self._weights.b_gate_up is not None
            add_bias(self._y, self._weights.b_gate_up)
            clamped_glu(self._y, np.float32(self._clamped.alpha), np.float32(self._clamped.limit), self._h)
        elif self._activation == "silu":
            swiglu_into(self._y, 0, self._h)
        else:
            geglu_into(self._y, 0, self._h)
        self._u = _transposed_product(d_out, self._weights.down)

    def d_scale(self) -> F32:
        """Gradient of the factors of the output, (m,)."""
        out = np.empty(len(self._h), np.float32)
        row_products(self._h, self._u, out)
        if self._weights.b_down is not None:
            add_bias_products(self._d_out, self._weights.b_down, out)
        return out

    def input(self, scale: F32, mask: I64 | None = None) -> F32:
        """Gradient of the input, (m, hidden), where the output has factors `scale` (m,); of `mask` the rows alone count.

        What the weights get is added to their gradients.
        """
        rows = _all(self._x)
        d_out, dh, h = _taken(self._d_out, rows, scale), _taken(self._u, rows, scale), self._h
        dy = np.empty_like(self._y)
        if self._clamped is not None:
            clamped_glu_backward(self._y, np.float32(self._clamped.alpha), np.float32(self._clamped.limit), dh, dy)
        elif self._activation == "silu":
            swiglu_backward(self._y, dh, dy)
        else:
            geglu_backward(self._y, dh, dy)
        if mask is not None:
            for values in (h, dy):  # what was no number, too: nobody asked for it
                keep_rows(mask, values)
        add_weight_gradient(h, rows, d_out, self._found.down)
        add_weight_gradient(self._x, rows, dy, self._found.gate_up)
        if self._found.b_down is not None and self._found.b_gate_up is not None:
            add_column_sums(d_out, self._found.b_down)
            add_column_sums(dy, self._found.b_gate_up)
        return _transposed_product(dy, self._weights.gate_up)


def _mask_every_token(
    x: F32, weights: Mixture, rules: Rules, decision: Decision, d_out: F32, found: Mixture, dx: F32, d_share: F32
) -> None:
    """Every expert for every token."""
    for expert, network in enumerate(weights.experts):
        rows, scale = _search(decision, expert)
        of_network = _Backward(network, found.experts[expert], rules.activation, rules.clamped)
        of_network.hidden(x, d_out)
        put_in_slots(of_network.d_scale()[rows], rows, expert, decision.topk_ids, d_share)
        factor = np.zeros(len(x), np.float32)
        factor[rows] = scale
        _add(of_network.input(factor, rows), dx)


def _search(decision: Decision, expert: int) -> tuple[I64, F32]:
    """Tokens that chose an expert, ascending, and their weights."""
    n = len(decision.topk_ids)
    rows, scale, count = np.empty(n, np.int64), np.empty(n, np.float32), np.empty(1, np.int64)
    select_expert(decision.topk_ids, decision.topk_weights, expert, rows, scale, count)
    return rows[: count[0]].copy(), scale[: count[0]].copy()


def _visited(
    x: F32, weights: Mixture, rules: Rules, decision: Decision, d_out: F32, found: Mixture, dx: F32, d_share: F32, *, sorted_once: bool
) -> None:  # fmt: skip
    """Every expert for the tokens that chose it: found expert by expert, or all taken in the order of experts, and put back, at once."""
    before, n_experts = rules.routing.probability_before_ffn, len(weights.experts)
    ends: list[tuple[I64, F32, F32]] = []
    visits = _in_order(x, decision, d_out, n_experts) if sorted_once else _one_by_one(x, decision, d_out, n_experts)
    for expert, rows, scale, mine, d_mine in visits:
        one = np.ones(len(rows), np.float32)
        of_network = _Backward(weights.experts[expert], found.experts[expert], rules.activation, rules.clamped)
        of_network.hidden(_taken(mine, _all(mine), scale) if before else mine, d_mine)
        d_input = of_network.input(one if before else scale)
        d_scale = of_network.d_scale()
        if before:
            row_products(d_input, mine, d_scale)
        put_in_slots(d_scale, rows, expert, decision.topk_ids, d_share)
        if sorted_once:
            ends.append((rows, scale if before else one, d_input))
        else:
            combine_into(d_input, rows, scale if before else one, 0, dx)
    if ends:
        rows, scale, d_input = (np.concatenate(part) for part in zip(*ends, strict=True))
        combine_into(d_input, rows, scale, 0, dx)


Visit = tuple[int, I64, F32, F32, F32]
"""Expert, its tokens, their weights, their inputs and the gradients of their outputs."""


def _one_by_one(x: F32, decision: Decision, d_out: F32, n_experts: int) -> Iterator[Visit]:
    for expert in range(n_experts):
        rows, scale = _search(decision, expert)
        yield expert, rows, scale, _taken(x, rows), _taken(d_out, rows)


def _in_order(x: F32, decision: Decision, d_out: F32, n_experts: int) -> Iterator[Visit]:
    n = decision.topk_ids.size
    starts, rows, scale = np.empty(n_experts + 1, np.int64), np.empty(n, np.int64), np.empty(n, np.float32)
    group_tokens(decision.topk_ids, decision.topk_weights, starts, rows, scale)
    sorted_x, sorted_d = (_taken(values, rows[: starts[-1]]) for values in (x, d_out))
    for expert in range(n_experts):
        mine = slice(int(starts[expert]), int(starts[expert + 1]))
        yield expert, rows[mine], scale[mine], sorted_x[mine], sorted_d[mine]
