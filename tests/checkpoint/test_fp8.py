"""FP8 with block scales: every code by its definition, partial blocks, parts without the rest, and what does not fit is named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint, parse_config
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.checkpoint.fp8 import NUMBERS, POWERS
from wse_emu.checkpoint.fp8_config import ModuleNames
from wse_emu.checkpoint.stored import bytes_by_config
from wse_emu.foundation.errors import CheckpointError, ConfigError

from ..machine.models import EVERY_FAMILY
from . import fp8_files
from .fp8_files import coded, in_full, twins

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 20, "intermediate_size": 14, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 6, "q_lora_rank": 5, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 9, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.3,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 6], "activation_scheme": "dynamic"},
}  # fmt: skip
NAME = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def is_coded(name: str) -> bool:
    return name.endswith("_proj.weight") or "proj_with_mqa" in name


def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """As they are stored, and the numbers that they stand for."""
    return twins(CONFIG)


def write(directory: Path, stored: dict[str, np.ndarray], config: dict[str, Any] = CONFIG) -> Path:
    return fp8_files.write(directory, stored, config)


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


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, np.uint8])
@pytest.mark.parametrize("says", [{}, {"scale_fmt": "ue8m0"}])
def test_scales_stored_as_exponents_are_powers_of_two(says: dict[str, str], dtype: type, tmp_path: Path) -> None:
    stored, plain = tensors()
    for name in [name for name in plain if is_coded(name)]:
        exponents = stored[name + "_scale_inv"] = np.exp2(np.ceil(np.log2(stored[name + "_scale_inv"]))).astype(ml_dtypes.float8_e8m0fnu)
        spread = np.repeat(np.repeat(exponents.astype(np.float32), 8, axis=0), 6, axis=1)[tuple(map(slice, plain[name].shape))]
        plain[name] = stored[name].astype(np.float32) * spread
        stored[name + "_scale_inv"] = exponents.view(dtype)
    config = CONFIG | {"quantization_config": CONFIG["quantization_config"] | says}
    with open_checkpoint(write(tmp_path / "m", stored, config)) as opened:
        assert sorted(plain) == list(opened.tensors.names())
        for name, values in plain.items():
            np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
        np.testing.assert_array_equal(opened.tensors.read_part(NAME, (slice(1, 10, 3), slice(5, 19))), plain[NAME][1:10:3, 5:19])
        assert opened.tensors.stored_bytes(NAME) == 10 * 20 + 2 * 4
        by_config = bytes_by_config(config, opened.spec)(NAME)
        assert by_config == 10 * 20 + 2 * 4 * (1 if says else 4), "a byte for each scale where config.json says so"
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
        ({scales: stored[scales].astype(np.float64)}, r"_scale_inv is stored as F64; readable are float32, .*, F8_E8M0, U8"),
    ]):  # fmt: skip
        some = {name: value for name, value in {**stored, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(write(tmp_path / str(i), some))
    stored[NAME] = stored[NAME].copy()
    stored[NAME][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa\.weight\[3, 4\] is nan; weights must be finite"):
        wse.from_pretrained(write(tmp_path / "nan", stored), wafer=wse.Wafer(wse.WSE3, rows=2, cols=3), cache_dir=tmp_path / "c")
    for change, message in (
        ({"fmt": "e5m2"}, "`fmt` must be 'e4m3' or 'e4m3fn' or 'float8_e4m3fn', got 'e5m2'"),
        ({"scale_fmt": "e5m2"}, "`scale_fmt` must be 'float' or 'ue8m0'"),
        ({"expert_dtype": "fp4"}, "`expert_dtype` must be 'fp8', got 'fp4'"),
        ({"activation_scheme": "other"}, "`activation_scheme` must be 'dynamic' or 'static', got 'other'"),
        ({"weight_block_size": [0, 4]}, "`weight_block_size` must be two positive integers, or null"),
        ({"weight_block_size": [4]}, "`weight_block_size` must be two positive integers, or null"),
        ({"modules_to_not_convert": "lm_head"}, "`modules_to_not_convert` must be a list of modules' names"),
        ({"modules_to_not_convert": ["(a+)+b"]}, "`modules_to_not_convert` must be a list of modules' names"),
        ({"modules_to_not_convert": [".*.*.*.*"]}, "at most 3 `\\*` stand"),
        ({"modules_to_not_convert": ["*.gate"]}, "a `\\*` repeats the character before it"),
        ({"ignored_layers": [3]}, "`ignored_layers` must be a list of modules' names"),
        ({"modules_to_not_convert": [f"a{i}.*" for i in range(257)]}, "more than 256 names with"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(CONFIG | {"quantization_config": {**CONFIG["quantization_config"], **change}})
    with pytest.raises(ConfigError, match="`quant_method` must be 'fp8' for this family; or use a float32"):
        parse_config({**CONFIG, "quantization_config": {"quant_method": "awq"}})


MINIMAX = {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [8, 6],
           "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}  # fmt: skip
"""As MiniMax-M2 says it, but for the size of a block."""


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_every_family_may_be_in_fp8(family: str, tmp_path: Path) -> None:
    """Partial blocks at both edges, experts one by one, below one another, or on an axis of their own."""
    config = EVERY_FAMILY[family] | {"quantization_config": MINIMAX}
    stored, plain = twins(config)
    with open_checkpoint(fp8_files.write(tmp_path / "m", stored, config)) as opened:
        assert sorted(plain) == list(opened.tensors.names())
        assert opened.ignored == ()
        for name, values in plain.items():
            np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
            half = len(values) // 2
            np.testing.assert_array_equal(opened.tensors.read_rows(name, half, len(values)), values[half:], err_msg=name)
        deep = [name for name in plain if plain[name].ndim == 3 and name + "_scale_inv" in stored]
        for name in deep:
            np.testing.assert_array_equal(opened.tensors.read_part(name, (1, slice(1, 9, 2), slice(3, 8))), plain[name][1, 1:9:2, 3:8])
        assert bool(deep) == (family in ("granitemoe", "gpt_oss", "llama4_text"))
        by_config = bytes_by_config(config, opened.spec)
        assert {name: by_config(name) for name in plain} == {name: opened.tensors.stored_bytes(name) for name in plain}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("minimax_m2", "qwen3_moe", "granitemoe", "llama4_text")]


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v32", "glm_moe_dsa", *SLOW])
def test_a_model_of_another_family_in_fp8_is_the_model_of_its_numbers(family: str, tmp_path: Path) -> None:
    """Dense too, and with an indexer: the bits of the logits, and every stage against the reference."""
    config, ids = EVERY_FAMILY[family] | {"quantization_config": MINIMAX}, np.arange(9)
    models = [
        wse.from_pretrained(fp8_files.write(tmp_path / name, of, c), wafer=wse.Wafer(wse.WSE3, rows=2, cols=3), cache_dir=tmp_path / "c")
        for name, of, c in zip(("coded", "plain"), twins(config), (config, EVERY_FAMILY[family]), strict=True)
    ]
    np.testing.assert_array_equal(*(model(ids).logits for model in models))
    np.testing.assert_array_equal(*(model.generate(ids, 3) for model in models))
    report = models[0].verify(ids)
    assert report.passed, report


def test_what_is_stored_in_full_is_read_so_and_config_must_not_say_the_contrary(tmp_path: Path) -> None:
    """As transformers: a list of modules that are not converted; the type of a stored tensor decides about the others."""
    config = EVERY_FAMILY["qwen3_moe"]
    stored, plain = twins(config, kept=lambda role: in_full(role) or role.startswith("layers.0.") or role.endswith("w_down"))
    for kept in (["model.layers.0"], ["model.layers.0.*", "down_proj"], [".*layers.0.self_attn"], None):
        said = config | {"quantization_config": MINIMAX | {"modules_to_not_convert": kept}}
        with open_checkpoint(fp8_files.write(tmp_path / str(len(list(tmp_path.iterdir()))), stored, said)) as opened:
            for name, values in plain.items():
                np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
    for field, kept in (("modules_to_not_convert", ["k_proj"]), ("ignored_layers", ["model.layers.1"])):
        said = config | {"quantization_config": {**{k: v for k, v in MINIMAX.items() if k != "modules_to_not_convert"}, field: kept}}
        with pytest.raises(CheckpointError, match=r"layers\.1.* is stored as F8_E4M3, but by config\.json .* it is stored in full"):
            open_checkpoint(fp8_files.write(tmp_path / field, stored, said))
    with pytest.raises(CheckpointError, match=r"says that matrices are stored in FP8, but none is; .* take out `quantization_config`"):
        open_checkpoint(fp8_files.write(tmp_path / "none", plain, said))
    with pytest.raises(CheckpointError, match=r"is stored as F8_E4M3; readable are .* in FP8 where `quantization_config` of config"):
        open_checkpoint(fp8_files.write(tmp_path / "silent", stored, config))


def test_names_of_modules_are_read_as_transformers_reads_them() -> None:
    names = ModuleNames(("lm_head", "gate", "model.layers.1", "model.layers.2.mlp.", r"model.layers.*.self_attn", ".*norm"))
    inside = (
        "lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.up_proj", "model.layers.1",
        "model.layers.2.mlp.up_proj", "model.layers.31.self_attn.q_proj", "model.norm",
    )  # fmt: skip
    outside = ("model.layers.0.mlp.gate_proj", "model.layers.11.mlp.up_proj", "model.layers.3.mlp.up_proj", "model.layers.2.mlp2.up_proj",
               "model.normal.proj", "model.layers.3.self_attn2")  # fmt: skip
    assert [name for name in inside if name not in names] == []
    assert [name for name in outside if name in names] == []
    assert "lm_head" not in ModuleNames()
    start = time.perf_counter()
    assert "a" * 200 not in ModuleNames((".*.*.*b",))
    assert time.perf_counter() - start < 5


def test_a_scale_for_each_matrix_and_scales_of_activations(tmp_path: Path) -> None:
    """`weight_block_size` null; scales of activations go with FP8 arithmetic, which is not done here, and are named."""
    says, attention = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, ("w_q", "w_k", "w_v", "w_o")
    for family, shape in (("llama", ()), ("llama", (1,)), ("llama", (1, 1)), ("granitemoe", (4,)), ("granitemoe", (4, 1, 1))):
        config = EVERY_FAMILY[family] | {"quantization_config": says}
        stored, plain = twins(config, block=(1 << 20, 1 << 20), kept=lambda role: in_full(role) or role.endswith(attention))
        in_fp8 = [name for name in plain if name + "_scale_inv" in stored]
        for name in in_fp8:
            stored[name + "_scale_inv"] = stored[name + "_scale_inv"].reshape(shape)
            stored[name.removesuffix("weight") + "activation_scale"] = np.ones((), np.float32)
        with open_checkpoint(fp8_files.write(tmp_path / f"{family}{len(shape)}{sum(shape)}", stored, config)) as opened:
            assert opened.ignored == tuple(sorted(name for name in stored if name.endswith("activation_scale")))
            assert opened.ignored
            for name, values in plain.items():
                np.testing.assert_array_equal(opened.tensors.read(name), values, err_msg=name)
            by_config = bytes_by_config(config, opened.spec)
            assert [by_config(name) for name in in_fp8] == [opened.tensors.stored_bytes(name) for name in in_fp8]
        powers = config | {"quantization_config": says | {"scale_fmt": "ue8m0"}}
        for i, name in enumerate(in_fp8):
            stored[name + "_scale_inv"] = np.full(shape, 120 + i % 7, np.uint8)
        with open_checkpoint(fp8_files.write(tmp_path / f"{family}{len(shape)}{sum(shape)} powers", stored, powers)) as opened:
            for i, name in enumerate(in_fp8):
                exact = NUMBERS[stored[name].view(np.uint8)] * np.float32(2.0 ** (i % 7 - 7))
                np.testing.assert_array_equal(opened.tensors.read(name), exact, err_msg=name)
