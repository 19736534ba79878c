"""Hold a record of a run against the reference, stage by stage and end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence import tolerance
from wse_emu.equivalence.local import StageLocal
from wse_emu.equivalence.local_index import judge_ties
from wse_emu.equivalence.report import Failure, IndexTies, RoutingSummary, StageCheck, VerifyReport
from wse_emu.equivalence.routing import LayerRouting, judge_assigned, judge_routing, judge_together
from wse_emu.equivalence.stages import SOFTMAX_STAGES, core_of, expected_stages, expert_of, inputs_of, is_stored, stage_dtype, stage_shape
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.foundation.taps import Stage, TapRecord
from wse_emu.reference import DenseReference
from wse_emu.reference.storage import rounded, unit_roundoff

TWIN_FACTOR = 8.0
"""How many times the worst error of the naive float32 twin a run may reach end to end.

Both errors are draws from one law: the same roundings, summed in another order and carried through the same model. Measured on 900 random
models (1 to 6 layers, hidden 32 to 128, 1 to 96 tokens, dense and 4 or 8 experts) run with matrix products that were chained sums over
blocks of columns instead of the twin's BLAS: the worst stage and token reached 1.4 of what a factor of 1 allows with weights of the usual
size, and 4.4 with weights so large that scores reach the hundreds and attention magnifies every rounding; 0.31 and 0.55 of what 8 allows.
The stage-by-stage bounds are the sharp check; this one is for what only the whole shows.
"""

TWIN_TOKENS = 64
"""The twin runs on copies of a short prompt until it has this many tokens, and on two copies at least.

One draw says little: where a single direction carries the error, the ratio of two draws has no mean. So in every copy but the first the
embedding is moved by up to one unit in the last place, after which every rounding falls anew (Monte Carlo arithmetic: Parker, Pierce and
Eggert, Comput. Sci. Eng. 2(4), 2000). The worst of the copies counts.
"""


_Forward = Iterator[tuple[Stage, NDArray[Any]]]


class _LayerReader:
    """Keeps the tensors of one layer, so that everything that walks through the model in step reads each of them once."""

    def __init__(self, read: Callable[[str], NDArray[Any]]) -> None:
        self._read = read
        self._prefix = ""
        self._kept: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str) -> NDArray[Any]:
        prefix = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else ""
        if prefix != self._prefix:
            self._kept.clear()
            self._prefix = prefix
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name]


def verify_record(
    record: TapRecord, spec: ModelSpec, read: Callable[[str], NDArray[Any]], *, end_to_end: bool = True, precision: Precision = FLOAT32
) -> VerifyReport:
    """Hold every stage of a run against the float64 reference.

    1. Structure: the stages of the model, no other; shape, dtype, finite; expert ids valid and distinct; what is stored in a format of 16
       bits holds nothing else.
    2. Stage by stage: the stage's formula in float64, applied to the inputs that the run itself had, so that no earlier error enters.
       What float32 may lose there, and the rounding of what is stored, is derived in `wse_emu.equivalence.tolerance`. An embedding is a
       look-up and must be exact; so must, where 16 bits are stored, the plain sum of two stages.
    3. Routing: the experts of a token must be the highest of the run's own router logits, descending, equal ones by the rule's
       `tie_policy`. A set that
       differs from float64's is excused only where the scores are closer than their tolerance (`judge_routing`). Where tokens meet, the
       scores that are compared are a stage of their own, and the decision must be exactly what the rule makes of them.
    4. End to end: against the full dense float64 forward, which replays the run's routing (`end_to_end=False` leaves this out: it computes
       every expert for every token). See `TWIN_FACTOR`.

    Parameters
    ----------
    record : TapRecord
        Tokens ordered by (sequence, position), every sequence complete from position 0.
    read : callable
        ``read(name)`` returns a published tensor (Hugging Face name, ``[out, in]``). Each is asked for once, layer by layer.
    precision : Precision
        Formats in which the run stored its stages, keys and values: bounds follow them, and the naive twin stores what the run stores.

    Raises
    ------
    InputError
        If the record's tokens break the rules above or do not fit the model. What is wrong with its stages is in the report instead.
    """
    _check_tokens(record, spec)
    if precision.sums is not None and "hidden" not in record.col_starts:
        raise InputError("`record.col_starts` is empty: with `precision_opt_level` 1 a result depends on where features lie")
    with np.errstate(all="ignore"):  # what is not finite is named by the structure check
        return _Verification(record, spec, read, end_to_end, precision).report()


class _Verification:
    """One verification: its checks as they come."""

    def __init__(
        self, record: TapRecord, spec: ModelSpec, read: Callable[[str], NDArray[Any]], end_to_end: bool, precision: Precision
    ) -> None:
        self._record = record
        self._precision = precision
        self._u = unit_roundoff(precision.dtype)
        self._spec = spec
        self._read = _LayerReader(read)
        self._expected = expected_stages(spec)
        self._usable: dict[Stage, NDArray[Any]] = {}
        self._structure = self._check_structure()
        self._usable_record = TapRecord(
            record.seq, record.pos, record.token_ids, self._usable, pass_of_token=record.pass_of_token, col_starts=record.col_starts
        )  # fmt: skip
        self._local = StageLocal(self._usable_record, spec, self._read, precision)
        self._end_to_end = end_to_end
        self._copies = max(2, -(-TWIN_TOKENS // len(record.seq)))
        self._checks: list[StageCheck] = []
        self._notes: list[str] = [] if precision == FLOAT32 else [f"stored in {precision}; bounds follow that"]
        self._routing: list[LayerRouting] = []

    def report(self) -> VerifyReport:
        forwards = self._forwards()
        for number, stage in enumerate(self._expected, start=1):
            self._checks.append(self._structure.get(stage) or self._check_own_inputs(stage))
            if forwards is None:
                continue
            exact, naive = (_take(forward, stage) for forward in forwards)
            if stage in self._usable and stage[1] not in ("topk_ids", "router_scores", "index_keys"):  # the choices are replayed
                self._checks.append(self._check_end_to_end(stage, number, exact, naive))
        self._checks += [c for stage, c in self._structure.items() if stage not in set(self._expected)]
        failed = [c for c in self._checks if c.status == "failed"]
        first = next((c for c in failed if c.kind != "end to end"), failed[0] if failed else None)
        record = self._record
        return VerifyReport(
            family=self._spec.family,
            n_layers=self._spec.num_layers,
            n_sequences=len(np.unique(record.seq)),
            n_tokens=len(record.seq),
            stages=tuple(self._checks),
            routing=self._sum_routing(),
            index=self._sum_index(),
            first_failure=None if first is None else self._locate(first),
            notes=tuple(self._notes),
        )

    def _forwards(self) -> tuple[_Forward, _Forward] | None:
        """Start the float64 forward and the float32 twin, both replaying the run's routing; None if that is not wanted or not possible."""
        if not self._end_to_end:
            return None
        routing, shares = None, dict[int, NDArray[Any]]()
        if self._spec.is_moe:
            wanted = [(layer, "topk_ids") for layer in self._spec.moe_layers]
            if any(stage not in self._usable for stage in wanted):
                self._notes.append("end to end: the routing of the run cannot be replayed")
                return None
            routing = {layer: self._usable[layer, "topk_ids"] for layer in self._spec.moe_layers}
            rule = self._spec.routing
            if rule.weights_jump or rule.weighs_together:
                shares = {layer: self._usable[layer, "topk_weights"] for layer in routing if (layer, "topk_weights") in self._usable}
                why = "they jump" if rule.weights_jump else "they are shares of the tokens of a pass"
                self._notes.append(f"end to end: experts' weights are replayed with the choices: under this rule {why}")
        chosen: dict[int, NDArray[np.bool_]] = {}
        for layer in self._spec.indexer_layers:
            if (layer, "index_keys") not in self._usable:
                self._notes.append("end to end: the keys that the run chose cannot be replayed")
                return None
            chosen[layer] = self._usable[layer, "index_keys"]
        r, copies = self._record, self._copies
        n_tokens = len(r.seq)
        nudge = 1 + np.random.default_rng(0).uniform(-2 * self._u, 2 * self._u, (copies * n_tokens, self._spec.hidden_size))
        nudge[:n_tokens] = 1
        n_columns = 1 if self._precision.sums is None else len(r.col_starts["hidden"])
        exact = DenseReference(self._spec, self._read).stages(
            r.token_ids, r.seq, r.pos, routing=routing, routing_weights=shares, chosen_keys=chosen
        )  # fmt: skip
        twin = DenseReference(self._spec, self._read, dtype=np.float32, precision=self._precision, n_columns=n_columns).stages(
            np.tile(r.token_ids, copies),
            np.repeat(np.arange(copies), n_tokens) * (r.seq.max() + 1) + np.tile(r.seq, copies),
            np.tile(r.pos, copies),
            routing=None if routing is None else {layer: np.tile(ids, (copies, 1)) for layer, ids in routing.items()},
            routing_weights={layer: np.tile(share, (copies, 1)) for layer, share in shares.items()},
            chosen_keys={layer: np.tile(keys, (copies, 1)) for layer, keys in chosen.items()},
            nudge=nudge,
        )
        return exact, twin

    def _check_structure(self) -> dict[Stage, StageCheck]:
        """Failures of structure by stage; fills the stages that can serve as inputs (a NaN does not prevent that)."""
        out: dict[Stage, StageCheck] = {}
        n_tokens, n_keys = len(self._record.seq), int(self._record.pos.max()) + 1
        for layer, name in self._expected:
            value = self._record.stages.get((layer, name))
            if value is None:
                out[layer, name] = self._fail(layer, name, "the stage is missing")
                continue
            shape, dtype = stage_shape(self._spec, name, n_tokens, n_keys), stage_dtype(name)
            if value.shape != shape or value.dtype != dtype:
                out[layer, name] = self._fail(layer, name, f"must be {dtype} of shape {shape}, is {value.dtype} of shape {value.shape}")
                continue
            if name == "topk_ids":
                bad = self._bad_ids(value)
                if bad is not None:
                    token, slot, why = bad
                    out[layer, name] = self._fail(layer, name, why, token, (slot,), int(value[token, slot]))
                    continue
            elif not np.isfinite(value).all():
                at = np.unravel_index(np.flatnonzero(~np.isfinite(value))[0], shape)
                token, element = int(at[0]), tuple(int(i) for i in at[1:])
                ids = self._usable.get((layer, "topk_ids"))
                expert, n_failed = expert_of(name, element, ids, token), int((~np.isfinite(value)).sum())
                out[layer, name] = self._fail(layer, name, f"holds {value[at]}", token, element, expert, n_failed)
            if is_stored(name) or (name in SOFTMAX_STAGES and self._precision.softmax is not None):
                other = np.argwhere(~np.isnan(value) & (rounded(value, self._precision.dtype) != value))
                if len(other):
                    token, element = int(other[0][0]), tuple(int(i) for i in other[0][1:])
                    message = f"holds {value[tuple(other[0])]}, which is no number of {self._precision.dtype}: it was stored unrounded"
                    ids = self._usable.get((layer, "topk_ids"))
                    out[layer, name] = self._fail(
                        layer, name, message, token, element, expert_of(name, element, ids, token), len(other)
                    )  # fmt: skip
            self._usable[layer, name] = value
        for layer, name in self._record.stages:
            if (layer, name) not in set(self._expected):
                out[layer, name] = self._fail(layer, name, f"the stage does not belong to a {self._spec.family} model of this shape")
        return out

    def _bad_ids(self, ids: NDArray[np.int64]) -> tuple[int, int, str] | None:
        """(token, slot, rule) of the first expert id that is out of range or repeated."""
        e = self._spec.num_experts
        lacks = (ids == -1) & self._spec.routing.has_capacity
        for token, slot in np.argwhere(((ids < 0) & ~lacks) | (ids >= e)):
            return int(token), int(slot), f"expert id {ids[token, slot]} must lie in 0..{e - 1}"
        for token, slot in np.argwhere(lacks[:, :-1] & ~lacks[:, 1:]):
            return int(token), int(slot), "a slot without an expert must come after those with one"
        ranked = np.sort(ids, axis=1)
        for token in np.flatnonzero(((np.diff(ranked, axis=1) == 0) & (ranked[:, 1:] >= 0)).any(axis=1)):
            slot = next(s for s in range(ids.shape[1]) if ids[token, s] in ids[token, :s])
            return int(token), slot, f"expert {ids[token, slot]} is chosen twice"
        return None

    def _fail(
        self,
        layer: int | None,
        name: str,
        message: str,
        token: int | None = None,
        element: tuple[int, ...] | None = None,
        expert: int | None = None,
        n_failed: int = 1,
    ) -> StageCheck:
        return StageCheck(
            layer=layer,
            stage=name,
            kind="structure",
            status="failed",
            error=np.inf,
            ratio=np.inf,
            n_failed=n_failed,
            token_index=token,
            token=None if token is None else self._token(token),
            expert=expert,
            element=element,
            message=message,
        )

    def _check_own_inputs(self, stage: Stage) -> StageCheck:
        """Apply the stage's float64 formula to the run's own inputs of that stage."""
        layer, name = stage
        for needed in inputs_of(self._spec, stage):
            if needed not in self._usable:
                where = needed[1] if needed[0] is None else f"{needed[1]} of layer {needed[0]}"
                return StageCheck(layer=layer, stage=name, kind="local", status="skipped", message=f"needs {where}")
        if name == "topk_ids":
            assert layer is not None
            return self._check_routing(layer)
        expected, bound = self._local.check(layer, name)
        error = _distance(self._usable[stage], expected)
        ratio = _ratio(error, bound)
        at = np.unravel_index(int(ratio.argmax()), ratio.shape)
        token, element = int(at[0]), tuple(int(i) for i in at[1:])
        n_failed = int((ratio > 1).sum())
        return StageCheck(
            layer=layer,
            stage=name,
            kind="local",
            status="failed" if n_failed else "passed",
            error=float(error[at]),
            bound=float(bound[at]),
            ratio=float(ratio[at]),
            n_failed=n_failed,
            token_index=token,
            token=self._token(token),
            expert=expert_of(name, element, self._usable.get((layer, "topk_ids")), token),
            element=element,
        )

    def _check_routing(self, layer: int) -> StageCheck:
        ids, rule = self._usable[layer, "topk_ids"], self._spec.routing
        if rule.tokens_meet:
            scores, together = self._usable[layer, "router_scores"], self._record.together
            found = judge_together(ids, scores, together, self._spec.top_k, rule)
        elif rule.is_learned:
            exact, bound = self._local.check(layer, "router_logits")
            own = self._usable[layer, "router_logits"]
            correction = self._local.correction(layer)
            found = judge_routing(self._record, layer, ids, own, exact, bound, rule=rule, correction=correction)
        else:
            numbers = self._record.token_ids if rule.routing_algorithm == "hash" else self._record.pos
            found = judge_assigned(ids, numbers, self._spec.num_experts)
        self._routing.append(found)
        fault = found.fault
        if fault is None:
            gap, allowed = found.worst
            return StageCheck(
                layer=layer,
                stage="topk_ids",
                kind="routing",
                status="passed",
                error=gap,
                bound=allowed if gap else 0.0,
                ratio=gap / allowed,
            )
        return StageCheck(
            layer=layer,
            stage="topk_ids",
            kind="routing",
            status="failed",
            error=fault.gap,
            bound=fault.tolerance,
            ratio=max(fault.gap / fault.tolerance, 1.0) if fault.tolerance else np.inf,
            n_failed=found.faulty_tokens,
            token_index=fault.token,
            token=self._token(fault.token),
            expert=fault.expert,
            element=(fault.slot,),
            message=fault.message,
        )

    def _check_end_to_end(self, stage: Stage, number: int, exact: NDArray[Any], naive: NDArray[Any]) -> StageCheck:
        """Compare one stage with the full float64 forward; `number` counts the stages that led to it."""
        layer, name = stage
        n_tokens = len(exact)
        distance = _distance(self._usable[stage], exact).reshape(n_tokens, -1)
        error = distance.max(axis=1)
        copies = naive.reshape(self._copies, *exact.shape)
        naive_error = np.max([_distance(copy, exact).reshape(n_tokens, -1).max(axis=1) for copy in copies], axis=0)
        size = np.abs(exact).reshape(n_tokens, -1).max(axis=1)
        scale = np.maximum(size, np.median(size))
        worst_naive = (naive_error / np.where(scale > 0, scale, 1)).max()
        allowed = TWIN_FACTOR * worst_naive * scale + self._u / tolerance.U * tolerance.sum_bound(number, scale)
        ratio = _ratio(error, allowed)
        token = int(ratio.argmax())
        at = np.unravel_index(int(distance[token].argmax()), exact.shape[1:])
        element = tuple(int(i) for i in at)
        n_failed = int((ratio > 1).sum())
        return StageCheck(
            layer=layer,
            stage=name,
            kind="end to end",
            status="failed" if n_failed else "passed",
            error=float(error[token]),
            bound=float(allowed[token]),
            ratio=float(ratio[token]),
            n_failed=n_failed,
            token_index=token,
            token=self._token(token),
            expert=expert_of(name, element, self._usable.get((layer, "topk_ids")), token),
            element=element,
        )

    def _sum_routing(self) -> RoutingSummary:
        found = self._routing
        return RoutingSummary(
            n_decisions=len(found) * len(self._record.seq),
            exact_ties=sum(r.exact_ties for r in found),
            rounded_ties=sum(r.rounded_ties for r in found),
            near_ties=tuple(tie for r in found for tie in r.near_ties),
            swaps=sum(r.swaps for r in found),
            misordered=sum(r.misordered for r in found),
        )

    def _sum_index(self) -> IndexTies:
        own, layers = self._spec.indexer, [layer for layer in self._spec.indexer_layers if (layer, "index_scores") in self._usable]
        if own is None or not layers:
            return IndexTies()
        found = [judge_ties(self._usable[layer, "index_scores"], self._record.pos, own.topk) for layer in layers]
        return IndexTies(
            n_choices=sum(t.n_choices for t in found), ties=sum(t.ties for t in found), zero_ties=sum(t.zero_ties for t in found)
        )

    def _locate(self, check: StageCheck) -> Failure:
        row: int | None = None
        col: int | None = None
        if check.token_index is not None and check.element is not None:
            row, col = core_of(self._record, self._spec, check.stage, check.token_index, check.element)
        return Failure(check=check, row=row, col=col)

    def _token(self, index: int) -> tuple[int, int]:
        return int(self._record.seq[index]), int(self._record.pos[index])


def _take(forward: _Forward, stage: Stage) -> NDArray[Any]:
    """Next stage of a forward, which runs in step with the list of stages."""
    at, value = next(forward)
    assert at == stage, f"reference gave {at}, expected {stage}"
    return value


def _distance(actual: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """``|actual - expected|`` in float64: 0 where both are the same infinity or both NaN, infinite where only one is NaN."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = np.where(same, 0.0, np.abs(a - b))
    return np.where(np.isnan(error), np.inf, error)


def _ratio(error: NDArray[np.float64], bound: NDArray[np.float64]) -> NDArray[np.float64]:
    """``error / bound``: 0 where there is no error, infinite where nothing is allowed or the bound is undefined."""
    ratio = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isnan(ratio), np.inf, ratio)


def _check_tokens(record: TapRecord, spec: ModelSpec) -> None:
    for name in ("seq", "pos", "token_ids"):
        a = getattr(record, name)
        if a.ndim != 1 or a.dtype != np.int64 or len(a) != len(record.seq):
            raise InputError(f"`record.{name}` must be int64 of shape ({len(record.seq)},), got {a.dtype} of shape {a.shape}")
    if record.pass_of_token is not None and record.pass_of_token.shape != record.seq.shape:
        raise InputError(f"`record.pass_of_token` must have shape {record.seq.shape}, got {record.pass_of_token.shape}")
    if record.row_of_token is not None and record.row_of_token.shape != record.seq.shape:
        raise InputError(f"`record.row_of_token` must have shape {record.seq.shape}, got {record.row_of_token.shape}")
    if not len(record.seq):
        raise InputError("`record` holds no token: there is nothing to verify")
    bad = np.flatnonzero((record.token_ids < 0) | (record.token_ids >= spec.vocab_size))
    if len(bad):
        raise InputError(
            f"`record.token_ids[{bad[0]}]` must lie in 0..{spec.vocab_size - 1} (`vocab_size`), got {record.token_ids[bad[0]]}"
        )
    starts = np.flatnonzero(np.diff(record.seq, prepend=record.seq[0] - 1))
    if (np.diff(record.seq) < 0).any():
        raise InputError("`record.seq` must not decrease: tokens are ordered by (sequence, position)")
    lengths = np.diff(np.append(starts, len(record.seq)))
    wanted = np.concatenate([np.arange(n) for n in lengths])
    wrong = np.flatnonzero(record.pos != wanted)
    if len(wrong):
        t = wrong[0]
        raise InputError(
            f"`record.pos[{t}]` must be {wanted[t]} (a sequence counts from 0, without gaps), "
            f"got {record.pos[t]} in sequence {record.seq[t]}"
        )
