"""The emulator and the dense reference against what transformers computed in float32 (golden files, see tools/make_golden.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint
from wse_emu.reference import DenseReference

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
CASES = ("t1", "t17", "t96", "padded")
ONE_BIG_CORE = dataclasses.replace(wse.WSE3, sram_bytes_per_core=1 << 24)
GRIDS = {"4x4": (wse.WSE3, 4, 4), "7x5": (wse.WSE3, 7, 5), "16x16": (wse.WSE3, 16, 16), "1x1": (ONE_BIG_CORE, 1, 1)}
TOLERANCE = 1e-4
"""Largest error allowed, in standard deviations of the array compared."""

Golden = dict[str, NDArray[Any]]


def golden_of(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_close(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    assert actual.shape == expected.shape, what
    error = np.abs(actual.astype(np.float64) - expected).max()
    spread = expected.std(dtype=np.float64)
    assert error <= TOLERANCE * spread, f"{what}: largest error {error:.2e}, standard deviation {spread:.2e}"


def model_of(name: str, grid: str) -> wse.WaferModel:
    spec, rows, cols = GRIDS[grid]
    return wse.from_pretrained(GOLDEN / name, wafer=wse.Wafer(spec, rows=rows, cols=cols))


def test_there_is_a_golden_file_for_every_family_and_dtype() -> None:
    assert CHECKPOINTS == ["llama-bfloat16", "llama-float32", "mixtral-bfloat16", "mixtral-float32"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_forward_is_that_of_transformers(name: str, grid: str) -> None:
    golden, model = golden_of(name), model_of(name, grid)
    is_moe = "t1.router_logits" in golden
    for case in CASES:
        mask = golden[f"{case}.attention_mask"]
        real = mask.astype(bool)
        out = model(
            golden[f"{case}.input_ids"],
            attention_mask=None if real.all() else mask,
            output_hidden_states=True,
            output_router_logits=is_moe,
        )
        assert out.logits.dtype == np.float32
        assert_close(out.logits[real], golden[f"{case}.logits"][real], f"{case}: logits")
        if f"{case}.hidden" in golden:
            hidden = golden[f"{case}.hidden"]
            assert len(out.hidden_states) == len(hidden)
            for i, (actual, expected) in enumerate(zip(out.hidden_states, hidden, strict=True)):
                assert_close(actual[real], expected[real], f"{case}: hidden state {i}")
        if is_moe:
            for layer, expected in enumerate(golden[f"{case}.router_logits"]):
                assert_close(out.router_logits[layer][real], expected[real], f"{case}: router logits of layer {layer}")
                np.testing.assert_array_equal(out.topk_ids[layer][real], golden[f"{case}.topk_ids"][layer][real])
                assert_close(
                    out.topk_weights[layer][real], golden[f"{case}.topk_weights"][layer][real], f"{case}: weights of layer {layer}"
                )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_are_those_of_transformers(name: str, grid: str) -> None:
    golden, model = golden_of(name), model_of(name, grid)
    for case in CASES:
        ids, mask, expected = (golden[f"{case}.{key}"] for key in ("input_ids", "attention_mask", "generated"))
        actual = model.generate(ids, max_new_tokens=expected.shape[1] - ids.shape[1], attention_mask=None if mask.all() else mask)
        np.testing.assert_array_equal(actual, expected, err_msg=case)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_dense_reference_is_that_of_transformers(name: str) -> None:
    golden, checkpoint = golden_of(name), open_checkpoint(GOLDEN / name)
    reference = DenseReference(checkpoint.spec, checkpoint.tensors.read)
    for case in CASES:
        ids, mask = golden[f"{case}.input_ids"], golden[f"{case}.attention_mask"]
        real = mask.astype(bool)
        seq, pos = np.nonzero(real)[0], (mask.cumsum(axis=1) - 1)[real]
        stages = reference.forward(ids[real], seq, pos)
        assert_close(stages[None, "logits"], golden[f"{case}.logits"][real], f"{case}: logits")
        for layer in range(checkpoint.spec.num_layers):
            if f"{case}.hidden" in golden:
                assert_close(stages[layer, "layer_out"], golden[f"{case}.hidden"][layer + 1][real], f"{case}: output of layer {layer}")
            if checkpoint.spec.is_moe:
                np.testing.assert_array_equal(stages[layer, "topk_ids"], golden[f"{case}.topk_ids"][layer][real])
                expected = golden[f"{case}.topk_weights"][layer][real]
                assert_close(stages[layer, "topk_weights"], expected, f"{case}: weights of layer {layer}")
