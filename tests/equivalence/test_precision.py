"""A wrong rounding is found: none, cut off, ties away from zero, an odd element; and the reference's formats are the formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.equivalence import verify_record
from wse_emu.equivalence.tolerance import stored_bound
from wse_emu.foundation.errors import InputError
from wse_emu.foundation.precision import Precision
from wse_emu.reference import DenseReference
from wse_emu.reference.storage import rounded, smallest, unit_roundoff
from wse_emu.wafer import storage, tensor
from wse_emu.wafer.storage import FORMATS
from wse_kernels.formats import decode, encode

CONFIG = {
    "model_type": "mixtral", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
IDS = np.random.default_rng(4).integers(0, 60, (2, 9))


def model_of(dtype: str) -> wse.WaferModel:
    return wse.from_config(CONFIG, seed=1, wafer=wse.Wafer(wse.WSE3, rows=3, cols=4), dtype=dtype)


def _no_rounding(x: np.ndarray, stored: str) -> None:
    pass


def _cut_off(x: np.ndarray, stored: str) -> None:
    keep = 23 - FORMATS[stored].mantissa_bits
    x.view(np.int32)[...] = x.view(np.int32) >> keep << keep


def _ties_away(x: np.ndarray, stored: str) -> None:
    keep = 23 - FORMATS[stored].mantissa_bits
    x.view(np.int32)[...] = x.view(np.int32) + (1 << (keep - 1)) >> keep << keep


@pytest.mark.parametrize(
    ("wrong", "kind", "stage"),
    [(_no_rounding, "structure", "embedding"), (_cut_off, "local", "embedding"), (_ties_away, "local", None)],
)
def test_a_wrong_rounding_is_found(
    wrong: Callable[[np.ndarray, str], None], kind: str, stage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("bfloat16")
    assert model.verify(IDS).passed
    monkeypatch.setattr(tensor, "round_in_place", wrong)
    report = model.verify(IDS)
    assert not report.passed
    assert report.first_failure is not None
    check = report.first_failure.check
    assert check.kind == kind
    if stage is None:  # a tie needs few bits: sums of stored numbers have them
        assert {c.stage for c in report.stages if c.status == "failed" and c.kind == "local"} <= {"embedding", "attn_residual", "layer_out"}
    else:
        assert check.stage == stage
    assert storage.round_in_place is not wrong


def test_one_step_of_the_format_is_found_in_any_stored_stage() -> None:
    model = model_of("cb16")
    record = model.record(IDS)
    read, precision = model.checkpoint.tensors.read, Precision(dtype="cb16")
    for stage in ("attn_norm", "q", "attn_context", "attn_out", "expert_hidden", "ffn_out"):
        value = record.stages[1, stage].copy()
        at = np.unravel_index(np.abs(value).argmax(), value.shape)
        code = encode(value, FORMATS["cb16"])
        code[at] += 2
        wrong = replace(record, stages={**record.stages, (1, stage): decode(code, FORMATS["cb16"])})
        report = verify_record(wrong, model.spec, read, end_to_end=False, precision=precision)
        assert report.first_failure is not None
        assert report.first_failure.check.stage == stage
    report = verify_record(record, model.spec, read, precision=Precision(dtype="float16"), end_to_end=False)
    assert not report.passed, "bounds follow the format that is named"


@pytest.mark.parametrize("dtype", FORMATS)
def test_formats_by_value_are_the_formats_by_bits(dtype: str) -> None:
    fmt = FORMATS[dtype]
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    x *= np.exp2(np.random.default_rng(1).integers(-40, 12, x.size)).astype(np.float32)
    assert np.array_equal(rounded(x, dtype), decode(encode(x, fmt), fmt))
    assert np.array_equal(rounded(x.astype(np.float64), dtype), decode(encode(x, fmt), fmt))
    assert smallest(dtype) == fmt.min_subnormal
    exact = x.astype(np.float64)
    error = np.abs(rounded(exact, dtype) - exact)
    bound = stored_bound(exact, np.zeros_like(exact), dtype)
    assert (error <= bound).all()
    assert (error > 0.9 * bound).any()
    assert unit_roundoff("float32") == 2.0**-24


def test_the_reference_itself_rounds_nothing() -> None:
    with pytest.raises(InputError, match="`precision` is for the naive twin"):
        DenseReference(model_of("bfloat16").spec, lambda _: np.zeros(1), precision=Precision(dtype="cb16"))
