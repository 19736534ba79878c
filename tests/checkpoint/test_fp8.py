"""FP8 with block scales: every code by its definition, partial blocks, parts without the rest, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint, parse_config, random_checkpoint
from wse_emu.checkpoint.fp8 import NUMBERS, POWERS, fp8_block
from wse_emu.foundation.errors import CheckpointError, ConfigError

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 20, "intermediate_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 6, "q_lora_rank": 5, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 9, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.3,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 6], "activation_scheme": "dynamic"},
}  # fmt: skip
NAME = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
TYPES = {
    np.dtype(np.float32): "F32", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3", np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.float64): "F64",
}  # fmt: skip


def coded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and numbers of a matrix, by ml_dtypes, block by block."""
    n, m = -(-weight.shape[0] // 8), -(-weight.shape[1] // 6)
    codes, scales, values = weight.astype(ml_dtypes.float8_e4m3fn), np.empty((n, m), np.float32), np.empty_like(weight)
    for i, j in np.ndindex(n, m):
        block = slice(8 * i, 8 * i + 8), slice(6 * j, 6 * j + 6)
        scales[i, j] = np.abs(weight[block]).max() / 448
        codes[block] = (weight[block] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        values[block] = codes[block].astype(np.float32) * scales[i, j]
    return codes, scales, values


def is_coded(name: str) -> bool:
    return name.endswith("_proj.weight") or "proj_with_mqa" in name


def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """As they are stored, and the numbers that they stand for."""
    source, stored, plain = random_checkpoint(CONFIG, seed=1).tensors, {}, {}
    for name in source.names():
        stored[name] = plain[name] = source.read(name)
        if is_coded(name):
            stored[name], stored[name + "_scale_inv"], plain[name] = coded(source.read(name))
    return stored, plain


def write(directory: Path, stored: dict[str, np.ndarray], config: dict[str, Any] = CONFIG) -> Path:
    directory.mkdir()
    header, data, at = {}, b"", 0
    for name, array in stored.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": TYPES[array.dtype], "shape": array.shape, "data_offsets": (at, at + len(raw))}
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_scales_that_are_powers_of_two_are_read_as_the_numbers_they_are(tmp_path: Path) -> None:
    stored, plain = tensors()
    for name in [name for name in plain if is_coded(name)]:
        scales = stored[name + "_scale_inv"] = np.exp2(np.ceil(np.log2(stored[name + "_scale_inv"])))
        spread = np.repeat(np.repeat(scales, 8, axis=0), 6, axis=1)[tuple(map(slice, plain[name].shape))]
        plain[name] = stored[name].astype(np.float32) * spread
    config = CONFIG | {"quantization_config": CONFIG["quantization_config"] | {"scale_fmt": "ue8m0"}}
    with open_checkpoint(write(tmp_path / "m", stored, config)) as opened:
        for name, values in plain.items():
            np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
    stored[NAME + "_scale_inv"][0, 0] *= 1.5
    with open_checkpoint(write(tmp_path / "wrong", stored, config)) as opened:
        with pytest.raises(CheckpointError, match=r"proj_with_mqa\.weight_scale_inv: with `scale_fmt` 'ue8m0' scales are powers of two"):
            opened.tensors.read(NAME)


@pytest.mark.parametrize("says", [{}, {"scale_fmt": "ue8m0"}])
def test_scales_stored_as_exponents_are_powers_of_two(says: dict[str, str], tmp_path: Path) -> None:
    stored, plain = tensors()
    for name in [name for name in plain if is_coded(name)]:
        exponents = stored[name + "_scale_inv"] = np.exp2(np.ceil(np.log2(stored[name + "_scale_inv"]))).astype(ml_dtypes.float8_e8m0fnu)
        spread = np.repeat(np.repeat(exponents.astype(np.float32), 8, axis=0), 6, axis=1)[tuple(map(slice, plain[name].shape))]
        plain[name] = stored[name].astype(np.float32) * spread
    config = CONFIG | {"quantization_config": CONFIG["quantization_config"] | says}
    with open_checkpoint(write(tmp_path / "m", stored, config)) as opened:
        assert sorted(plain) == list(opened.tensors.names())
        for name, values in plain.items():
            np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
        np.testing.assert_array_equal(opened.tensors.read_part(NAME, (slice(1, 10, 3), slice(5, 19))), plain[NAME][1:10:3, 5:19])
        assert opened.tensors.stored_bytes(NAME) == 10 * 20 + 2 * 4
    all_codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(POWERS, all_codes)


def test_codes_are_those_of_the_format() -> None:
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(NUMBERS, expected)
    np.testing.assert_array_equal(np.signbit(NUMBERS[[0, 128]]), [False, True])


def test_matrices_are_what_codes_and_scales_stand_for_in_whole_and_in_parts(tmp_path: Path) -> None:
    stored, plain = tensors()
    with open_checkpoint(write(tmp_path / "m", stored)) as opened:
        assert sorted(plain) == list(opened.tensors.names())
        for name, values in plain.items():
            np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
        whole = plain[NAME]
        assert whole.shape == (10, 20)  # blocks of 8 x 6: partial ones at both edges
        np.testing.assert_array_equal(opened.tensors.read_rows(NAME, 7, 10), whole[7:])
        np.testing.assert_array_equal(opened.tensors.read_part(NAME, (slice(1, 10, 3), slice(5, 19))), whole[1:10:3, 5:19])
        assert opened.tensors.dtype(NAME) == "float32"


def test_a_model_in_fp8_is_the_model_of_its_numbers(tmp_path: Path) -> None:
    stored, plain = tensors()
    extra = "model.layers.2.eh_proj.weight"
    stored[extra], stored[extra + "_scale_inv"], _ = coded(np.ones((9, 9), np.float32))
    config = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    ids = np.arange(9)
    models = [
        wse.from_pretrained(write(tmp_path / name, of, c), wafer=wse.Wafer(wse.WSE3, rows=2, cols=3), cache_dir=tmp_path / "c")
        for name, of, c in (("coded", stored, CONFIG), ("plain", plain, config))
    ]
    np.testing.assert_array_equal(*(model(ids).logits for model in models))
    assert models[0].checkpoint.ignored == (extra,)
    saved = models[0].save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    with open_checkpoint(saved) as opened:
        np.testing.assert_array_equal(opened.tensors.read(NAME), plain[NAME])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    stored, _ = tensors()
    scales = NAME + "_scale_inv"
    for i, (change, message) in enumerate([
        ({scales: stored[scales][:, 1:]}, r"mqa\.weight has shape \(10, 20\) and scales of shape \(2, 3\); one scale for every"),
        ({scales: None}, r"is stored as F8_E4M3, but its scales .*weight_scale_inv are missing"),
        ({NAME: stored[NAME].astype(np.float64)}, r"are stored as F64|is stored as F64"),
    ]):  # fmt: skip
        some = {name: value for name, value in {**stored, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(write(tmp_path / str(i), some))
    stored[NAME] = stored[NAME].copy()
    stored[NAME][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa\.weight\[3, 4\] is nan; weights must be finite"):
        wse.from_pretrained(write(tmp_path / "nan", stored), wafer=wse.Wafer(wse.WSE3, rows=2, cols=3), cache_dir=tmp_path / "c")
    for change, message in (
        ({"fmt": "e5m2"}, "`fmt` must be 'e4m3', got 'e5m2'"),
        ({"scale_fmt": "e5m2"}, "`scale_fmt` must be 'float' or 'ue8m0'"),
        ({"weight_block_size": [0, 4]}, "`weight_block_size` must be two positive integers"),
        ({"weight_block_size": None}, "`weight_block_size` must be two positive integers"),
    ):
        with pytest.raises(ConfigError, match=message):
            fp8_block({"quantization_config": {**CONFIG["quantization_config"], **change}}, "config.json")
    with pytest.raises(ConfigError, match="`quantization_config` is not supported"):
        parse_config({**CONFIG, "model_type": "deepseek_v2"})
