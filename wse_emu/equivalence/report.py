"""What a verification found: one check per stage and kind, the routing summary, the first failure; as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from wse_emu.foundation.units import counted

Kind = Literal["structure", "local", "routing", "end to end", "decode"]
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """One comparison of one stage; the element named is the worst one, by ``error / bound``."""

    layer: int | None
    """None outside the layers."""
    stage: str
    kind: Kind
    """"structure": shape, dtype, finite. "local": formula applied to the run's own inputs. "routing": decisions. "end to end": against
    the full float64 forward. "decode": generated tokens against the verified logits."""
    status: Status
    error: float = 0.0
    """Absolute; end to end: the largest of the token."""
    bound: float = 0.0
    """What was allowed there."""
    ratio: float = 0.0
    """``error / bound``; more than 1 fails. Infinite where nothing was allowed."""
    n_failed: int = 0
    """Elements (local) or tokens (routing, end to end) over their bound."""
    token_index: int | None = None
    """Index of the worst token in the flattened record."""
    token: tuple[int, int] | None = None
    """(sequence, position) of the worst token."""
    expert: int | None = None
    element: tuple[int, ...] | None = None
    """Indices after the token axis, in published order."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Where a record first departs from the reference."""

    check: StageCheck
    row: int | None
    """Row of the core that held the element; None if the record does not say."""
    col: int | None

    def __str__(self) -> str:
        c = self.check
        where = [f"layer {c.layer}"] if c.layer is not None else []
        where.append(f"stage {c.stage} ({c.kind})")
        if self.row is not None:
            where.append(f"core ({self.row}, {'?' if self.col is None else self.col})")
        if c.token is not None:
            where.append(f"token {c.token[1]} of sequence {c.token[0]}")
        if c.expert is not None:
            where.append(f"expert {c.expert}")
        if c.element is not None:
            where.append(f"element {list(c.element)}")
        said = c.message or f"error {c.error:.3g}, allowed {c.bound:.3g}; {c.n_failed} over their bound"
        return f"{', '.join(where)}: {said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NearTie:
    """A set of experts that differs from float64's, excused because the scores are closer than float32 can tell."""

    layer: int
    token: tuple[int, int]
    """(sequence, position)."""
    chosen: tuple[int, ...]
    """Experts taken that float64 would not take."""
    ideal: tuple[int, ...]
    """Experts that float64 would take instead."""
    gap: float
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSummary:
    """Routing decisions of all layers."""

    n_decisions: int = 0
    """Tokens times MoE layers judged."""
    exact_ties: int = 0
    """Decisions of whose k + 1 highest own scores two are equal: the id that the rule's `tie_policy` prefers must win. Where experts choose
    their tokens, none is counted."""
    rounded_ties: int = 0
    """Decisions that order experts unlike their logits, but only where float32 probabilities may be equal."""
    near_ties: tuple[NearTie, ...] = ()
    swaps: int = 0
    """Decisions whose set differs from float64's beyond the tolerance."""
    misordered: int = 0
    """Decisions that are not the highest of the run's own scores, descending, equal ones by the rule's `tie_policy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexTies:
    """Keys that indexers chose, over all layers that have one; whatever is counted here, the earlier of equal keys must have been taken."""

    n_choices: int = 0
    """Tokens with more keys than their indexer takes, times layers."""
    ties: int = 0
    """Choices in which a key that was passed over scores exactly what the last one taken does."""
    zero_ties: int = 0
    """Of those, the ones in which that score is 0: all heads' products are negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """The worst checks of one stage over all layers; None where there is none."""

    stage: str
    local: StageCheck | None
    """Of structure, against the run's own inputs, or of routing."""
    end_to_end: StageCheck | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Outcome of a verification; ``print(report)`` shows it, `to_dict` is for JSON."""

    family: str
    n_layers: int
    n_sequences: int
    n_tokens: int
    stages: tuple[StageCheck, ...]
    """Every check, in the order of the stages."""
    routing: RoutingSummary = field(default_factory=RoutingSummary)
    index: IndexTies = field(default_factory=IndexTies)
    first_failure: Failure | None = None
    """The first failing structure, local or routing check in the order of the stages; without any, the first failing end-to-end check."""
    notes: tuple[str, ...] = ()
    """What was not checked, and why."""

    def with_check(self, check: StageCheck) -> VerifyReport:
        """The report with one more check at its end."""
        failure = self.first_failure
        if failure is None and check.status == "failed":
            failure = Failure(check=check, row=None, col=None)
        return replace(self, stages=(*self.stages, check), first_failure=failure)

    @property
    def passed(self) -> bool:
        """Whether every check passed and none had to be skipped."""
        return all(c.status == "passed" for c in self.stages)

    def rows(self) -> list[StageRow]:
        """The table that people read: of every stage the worst checks (what failed, else the largest ``error / bound``)."""
        rows = []
        for name in dict.fromkeys(c.stage for c in self.stages):
            mine = [c for c in self.stages if c.stage == name]
            local, end = (_worst(c for c in mine if (c.kind == "end to end") is far) for far in (False, True))
            rows.append(StageRow(stage=name, local=local, end_to_end=end))
        return rows

    def unchecked(self) -> list[str]:
        """What was not checked, and why: stages without usable inputs, then `notes`."""
        skipped = [c for c in self.stages if c.status == "skipped"]
        if not skipped:
            return list(self.notes)
        first = skipped[0]
        where = "" if first.layer is None else f" of layer {first.layer}"
        stages = counted(len(skipped), "stage")
        return [f"{stages} without usable inputs; first {first.stage}{where}, which {first.message}", *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers; an infinite or undefined number becomes its name as a string."""
        plain = _plain({**asdict(self), "passed": self.passed, "first_failure_text": str(self.first_failure or "")})
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        n_bad = sum(c.status == "failed" for c in self.stages)
        verdict = "PASSED" if self.passed else f"FAILED ({n_bad} of {len(self.stages)} checks)"
        lines = [
            f"equivalence with the float64 reference: {verdict}",
            f"{self.family}, {counted(self.n_layers, 'layer')}, {counted(self.n_tokens, 'token')} in "
            f"{counted(self.n_sequences, 'sequence')}",
            "",
            f"{'':16} {'stage by stage, worst over layers':^49} | end to end",
            f"{'stage':16} {'error':>9} {'bound':>9} {'ratio':>7} {'layer':>5} {'seq:pos':>8} {'expert':>6} | "
            f"{'error':>8} {'allowed':>8} {'ratio':>6} {'layer':>5}",
        ]
        lines += [_line(row) for row in self.rows()]
        r = self.routing
        if r.n_decisions:
            lines.append("")
            ties = f"{counted(r.exact_ties, 'exact tie')}, {counted(r.rounded_ties, 'rounded tie')}"
            lines.append(f"routing: {counted(r.n_decisions, 'decision')}, {ties}, {counted(len(r.near_ties), 'near-tie')} excused,")
            lines.append(f"         {counted(r.swaps, 'swap')}, {r.misordered} misordered")
            lines += [
                f"  near-tie: layer {t.layer}, token {t.token[1]} of sequence {t.token[0]}: took {list(t.chosen)} for {list(t.ideal)}, "
                f"gap {t.gap:.2g} of {t.tolerance:.2g}"
                for t in r.near_ties[:5]
            ]
        if self.index.n_choices:
            i = self.index
            lines += ["", f"index keys: {counted(i.n_choices, 'choice')}, {counted(i.ties, 'tie')} ({i.zero_ties} at score 0)"]
        lines += [f"not checked: {what}" for what in self.unchecked()]
        if self.first_failure is not None:
            lines += ["", f"first failure: {self.first_failure}"]
        return "\n".join(line.rstrip() for line in lines)


def _line(row: StageRow) -> str:
    """One line of the printed table."""
    local, end = row.local, row.end_to_end
    cells = f"{row.stage:16} "
    if local is None or local.status == "skipped":
        cells += f"{'not checked':49}"
    else:
        token = "" if local.token is None else f"{local.token[0]}:{local.token[1]}"
        cells += (
            f"{local.error:9.2e} {local.bound:9.2e} {_ratio(local.ratio):>7} {_or_blank(local.layer):>5} {token:>8} "
            f"{_or_blank(local.expert):>6}"
        )
    if end is None or end.status == "skipped":
        return cells + " |"
    return cells + f" | {end.error:8.1e} {end.bound:8.1e} {_ratio(end.ratio):>6} {_or_blank(end.layer):>5}"


def _worst(checks: Iterable[StageCheck]) -> StageCheck | None:
    order = {"failed": 2, "passed": 1, "skipped": 0}
    return max(checks, key=lambda c: (order[c.status], c.ratio), default=None)


def _or_blank(value: int | None) -> str:
    return "" if value is None else str(value)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
