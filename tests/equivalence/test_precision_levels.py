"""A sum that is handed on wrongly is found: not rounded, cut off, rounded at another place, or rounded where it should not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.equivalence import verify_record
from wse_emu.equivalence.products import chained
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import Precision
from wse_emu.foundation.taps import TapRecord
from wse_emu.layers import linear
from wse_emu.reference.storage import rounded
from wse_emu.wafer.storage import FORMATS, ROUNDINGS
from wse_kernels.matmul import STORE, mesh_matmul

from .test_precision import CONFIG, IDS

F32 = NDArray[np.float32]
DTYPE = "cb16"
LEVEL_1 = Precision(dtype=DTYPE, precision_opt_level=1)


def model_of(level: int = 1, cols: int = 4, family: str = "mixtral") -> wse.WaferModel:
    wafer = wse.Wafer(wse.WSE3, rows=3, cols=cols)
    return wse.from_config({**CONFIG, "model_type": family}, seed=1, wafer=wafer, dtype=DTYPE, precision_opt_level=level)


def nearest(x: F32) -> F32:
    return rounded(x, DTYPE)


def not_rounded(acc: F32, p: F32) -> F32:
    return acc + p


def cut_off(acc: F32, p: F32) -> F32:
    keep = 23 - FORMATS[DTYPE].mantissa_bits
    return (acc.view(np.int32) >> keep << keep).view(np.float32) + p


def partial_rounded(acc: F32, p: F32) -> F32:
    return acc + nearest(p)


def sum_rounded(acc: F32, p: F32) -> F32:
    return nearest(nearest(acc) + p)


def right(acc: F32, p: F32) -> F32:
    return nearest(acc) + p


def handing_on(step: Callable[[F32, F32], F32]) -> Callable[..., int]:
    """A driver whose columns add as `step` says."""

    def driver(x, n_x_rows, k_starts, rows, w, w_offset, n_in, n_out, out, n_out_rows, out_starts, out_rows, scale, mode, fmt) -> int:
        total, m = None, len(rows)
        for k0, k1 in zip(k_starts[:-1].tolist(), k_starts[1:].tolist(), strict=True):
            if k0 < k1:
                mine, p = np.zeros((n_x_rows, n_in), np.float32), np.zeros(m * n_out, np.float32)
                mine[:, k0:k1] = x[n_x_rows * k0 : n_x_rows * k1].reshape(n_x_rows, -1)
                places, all_ = np.array([0, n_out]), np.arange(m)
                whole = np.array([0, n_in])
                mesh_matmul(mine.ravel(), n_x_rows, whole, rows, w, w_offset, n_in, n_out, p, m, places, all_, scale, STORE)
                total = p if total is None else step(total, p)
        one = np.concatenate([np.eye(n_out, dtype=np.float32)[:, j : j + 128].ravel() for j in range(0, n_out, 128)])
        one.flags.writeable = False
        mesh_matmul(
            total, m, np.array([0, n_out]), np.arange(m), one, 0, n_out, n_out, out, n_out_rows, out_starts, out_rows, scale, mode
        )  # fmt: skip
        return 0

    return driver


@pytest.mark.parametrize("step", [right, not_rounded, cut_off, partial_rounded, sum_rounded])
def test_a_sum_that_is_handed_on_wrongly_is_found(step: Callable[[F32, F32], F32], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    if step is right:
        want = model(IDS).logits
    monkeypatch.setattr(linear, "mesh_matmul_rounded", handing_on(step))
    report = model.verify(IDS)
    assert report.passed == (step is right), report
    if step is right:
        assert np.array_equal(model(IDS).logits, want), "the driver of this test is the machine's"
        return
    wrong = {c.stage for c in report.stages if c.status == "failed" and c.kind == "local"}
    assert "expert_out" in wrong
    assert wrong <= {"q", "k", "v", "attn_out", "expert_hidden", "expert_out"}
    if step in (not_rounded, cut_off, partial_rounded):
        assert {"q", "k", "v", "attn_out", "expert_hidden"} <= wrong, "not what is stored after the sum is whole"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_that_is_not_the_named_one_is_found(level: int) -> None:
    model = model_of(level)
    record, read = model.record(IDS), model.checkpoint.tensors.read
    for named in (0, 1, 2):
        precision = Precision(dtype=DTYPE, precision_opt_level=named)
        report = verify_record(record, model.spec, read, end_to_end=False, precision=precision)
        assert report.passed == (named == level), report


def test_a_record_that_does_not_say_where_features_lie_is_refused() -> None:
    model = model_of()
    record = replace(model.record(IDS), col_starts={})
    with pytest.raises(InputError, match=r"`record\.col_starts` is empty: with `precision_opt_level` 1 a result depends on where"):
        verify_record(record, model.spec, model.checkpoint.tensors.read, precision=LEVEL_1)


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_bounds_of_a_chain_hold_and_are_narrow(dtype: str) -> None:
    """Float32 chains by definition, on many numbers: inside the ends; one that is not rounded is far outside of them."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((40, 96)), rng.standard_normal((50, 96)).astype(np.float32)
    columns = np.sort(rng.integers(0, 9, 96))
    value, bound = chained(x.astype(np.float32).astype(np.float64), w, columns, dtype)
    for step, holds in ((lambda acc: rounded(acc, dtype), True), (lambda acc: acc, False)):
        total: F32 | None = None
        for column in np.unique(columns):
            p = np.zeros((40, 50), np.float32)
            for k in np.flatnonzero(columns == column).tolist():
                p = (x[:, k, None].astype(np.float32).astype(np.float64) * w[:, k] + p).astype(np.float32)
            total = p if total is None else step(total) + p
        assert total is not None
        inside = np.abs(total - value) <= bound
        assert inside.all() if holds else inside.mean() < 0.1
    step_at_one = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "cb16": 2.0**-9}[dtype]
    assert np.median(bound) < 1e-3 * step_at_one * np.median(np.abs(value)) * 3


def softmax_of(record: TapRecord, spec: ModelSpec, wrong: str) -> dict[tuple[int, str], F32]:
    """Attention of layer 0 from the run's queries, keys and values in NumPy's float32, its state rounded after every key; but one thing."""
    q, k, v = (record.stages[0, name] for name in ("q_rope", "k_rope", "v"))
    shape, group = q.shape[:2], spec.num_heads // spec.num_kv_heads
    top, denominator, context = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(q.shape, np.float32)

    def kept(x: F32, what: str) -> F32:
        if wrong == what:
            return x
        if wrong == what + " cut off":
            keep = 23 - FORMATS[DTYPE].mantissa_bits
            return (np.asarray(x, np.float32).view(np.int32) >> keep << keep).view(np.float32)
        return nearest(np.asarray(x, np.float32))

    for t, head in np.ndindex(shape):
        seen = np.flatnonzero((record.seq == record.seq[t]) & (record.pos <= record.pos[t]))
        scores = (k[seen, head // group].astype(np.float64) @ q[t, head] * spec.attention_scale).astype(np.float32)
        m = kept(scores.max(), "maximum")
        d, o = np.float32(0), np.zeros(q.shape[2], np.float32)
        for j, key in enumerate(seen.tolist()):
            p = kept(np.exp(scores[j] - m), "weight")
            d = kept(d + p, "denominator")
            o = kept(o + p * v[key, head // group], "output")
        top[t, head], denominator[t, head], context[t, head] = m, d, nearest(o / d)
    return {(0, "attn_max"): top, (0, "attn_denominator"): denominator, (0, "attn_context"): context.reshape(len(q), -1)}


WRONG = {
    "": None,
    "maximum": "attn_max", "maximum cut off": "attn_max",
    "weight": "attn_denominator", "weight cut off": "attn_denominator",
    "denominator": "attn_denominator", "denominator cut off": "attn_denominator",
    "output": "attn_context", "output cut off": "attn_context",
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_softmax_that_is_rounded_wrongly_is_found(wrong: str) -> None:
    model = model_of(2)
    record = model.record(IDS)
    changed = replace(record, stages=record.stages | softmax_of(record, model.spec, wrong))
    report = verify_record(
        changed, model.spec, model.checkpoint.tensors.read, end_to_end=False, precision=Precision(dtype=DTYPE, precision_opt_level=2)
    )  # fmt: skip
    failed = [check for check in report.stages if check.status == "failed" and check.layer == 0 and check.stage.startswith("attn_")]
    failed = [check for check in failed if check.stage in ("attn_max", "attn_denominator", "attn_context")]
    assert (failed[0].stage if failed else None) == WRONG[wrong]


def test_a_state_that_holds_more_than_16_bits_is_named() -> None:
    model = model_of(2)
    record = model.record(IDS)
    other = record.stages[1, "attn_denominator"] * np.float32(1 + 2.0**-20)
    changed = replace(record, stages=record.stages | {(1, "attn_denominator"): other})
    report = verify_record(
        changed, model.spec, model.checkpoint.tensors.read, end_to_end=False, precision=Precision(dtype=DTYPE, precision_opt_level=2)
    )  # fmt: skip
    assert report.first_failure is not None
    assert report.first_failure.check.stage == "attn_denominator"
    assert "which is no number of cb16" in report.first_failure.check.message
