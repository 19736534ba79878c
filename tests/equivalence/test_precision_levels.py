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
from wse_emu.foundation.precision import Precision
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


@pytest.mark.parametrize("level", [0, 1])
def test_a_level_that_is_not_the_named_one_is_found(level: int) -> None:
    model = model_of(level)
    record, read = model.record(IDS), model.checkpoint.tensors.read
    for named in (0, 1):
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
