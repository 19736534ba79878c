"""The verification's findings: the stages' worst errors against their bounds, and the routing decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from wse_emu.foundation.units import counted
from wse_emu.reports.charts import Segment, bar
from wse_emu.reports.markup import Child, Markup, join, table, tag

if TYPE_CHECKING:
    from wse_emu.equivalence.report import RoutingSummary, StageCheck, VerifyReport

_MOST_TIES: Final = 20
"""Near-ties that are listed one by one."""


def pill(found: VerifyReport | None) -> Markup:
    """The verdict in a word."""
    if found is None:
        return tag("span", "not verified in this run", class_="pill open")
    if found.passed:
        return tag("span", "verified against the float64 reference", class_="pill good")
    return tag("span", "verification FAILED", class_="pill bad")


def verdict_section(found: VerifyReport) -> Markup:
    """Table of the stages, routing decisions, what was not checked."""
    heads = (
        "stage", "error", "bound", "error / bound", "layer", "sequence:position", "expert",
        "end to end: error", "allowed", "error / allowed", "layer",
    )  # fmt: skip
    rows = found.rows()
    failed = {i for i, row in enumerate(rows) if "failed" in (_status(row.local), _status(row.end_to_end))}
    failure = None
    if found.first_failure is not None:
        failure = tag("p", tag("b", "First failure: "), str(found.first_failure), class_="alert bad")
    return join([
        tag("p", pill(found)),
        failure,
        tag("p", f"A run of its own over {counted(found.n_tokens, 'token')} in {counted(found.n_sequences, 'sequence')}. Of every "
                 "stage the worst check over all layers: at the left its formula in float64, applied to the run's own inputs of that "
                 "stage; at the right a full float64 forward pass. More than 1 fails.", class_="lead"),
        table(heads, [[row.stage, *_local(row.local), *_end_to_end(row.end_to_end)] for row in rows], id="stage-checks", failed=failed),
        _routing(found.routing) if found.routing.n_decisions else None,
        tag("p", f"Of {counted(found.index.n_choices, 'choice')} of keys by indexers, equal scores leave {found.index.ties:,} open "
                 f"({found.index.zero_ties:,} at score 0), in which the earlier keys must win.") if found.index.n_choices else None,
        *(tag("p", f"Not checked: {what}", class_="note") for what in found.unchecked()),
    ])  # fmt: skip


def _status(check: StageCheck | None) -> str:
    return "" if check is None else check.status


def _local(check: StageCheck | None) -> list[Child]:
    if check is None or check.status == "skipped":
        return ["not checked", *[None] * 5]
    token = None if check.token is None else f"{check.token[0]}:{check.token[1]}"
    return [*_ratio(check), check.layer, token, check.expert]


def _end_to_end(check: StageCheck | None) -> list[Child]:
    if check is None or check.status == "skipped":
        return [None] * 4
    return [*_ratio(check), check.layer]


def _ratio(check: StageCheck) -> list[Child]:
    over = check.ratio > 1
    picture = bar([Segment("over" if over else "ratio", min(check.ratio, 1.0), f"{check.ratio:.3g}")], 1)
    return [
        f"{check.error:.2e}",
        f"{check.bound:.2e}",
        join([f"{check.ratio:.3f}" if check.ratio < 100 else f"{check.ratio:.1e}", picture]),
    ]


def _routing(found: RoutingSummary) -> Markup:
    counts = (
        ("decisions", found.n_decisions, "tokens times MoE layers"),
        ("exact ties", found.exact_ties, "two of the k + 1 highest scores are equal; the id that the rule prefers must win"),
        ("rounded ties", found.rounded_ties, "ordered unlike the logits, only where float32 probabilities may be equal"),
        ("near-ties", len(found.near_ties), "set differs from float64's, excused because the scores are closer than float32 can tell"),
        ("swaps", found.swaps, "set differs from float64's beyond the tolerance"),
        ("misordered", found.misordered, "not the highest of the run's own scores in descending order"),
    )
    parts = [
        tag("h3", "Routing decisions"),
        table(["", "count", "what it means"], [[name, f"{n:,}", words] for name, n, words in counts], id="routing", style="words"),
    ]
    if found.near_ties:
        rows = [
            [f"layer {t.layer}", f"{t.token[0]}:{t.token[1]}", _ids(t.chosen), _ids(t.ideal), f"{t.gap:.2g}", f"{t.tolerance:.2g}"]
            for t in found.near_ties[:_MOST_TIES]
        ]
        heads = ["near-tie", "sequence:position", "took", "float64 would take", "gap", "tolerance"]
        parts.append(table(heads, rows, id="near-ties"))
        if len(found.near_ties) > _MOST_TIES:
            parts.append(tag("p", f"and {counted(len(found.near_ties) - _MOST_TIES, 'further near-tie')}", class_="note"))
    return join(parts)


def _ids(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
