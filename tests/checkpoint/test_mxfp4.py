"""MXFP4: every code and scale by its definition, parts without the rest, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint, parse_config, random_checkpoint
from wse_emu.checkpoint.mxfp4 import Mxfp4Tensors, decode
from wse_emu.foundation.errors import CheckpointError, ConfigError
from wse_emu.foundation.weights import all_weights
from wse_emu.memoryx.layout import Layout

CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "num_local_experts": 3,
    "num_experts_per_tok": 2, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def packed(seed: int = 0) -> dict[str, np.ndarray]:
    rng, out = np.random.default_rng(seed), {}
    for name, n_out, n_in in ((UP, 384, 32), (DOWN, 32, 192)):
        out[name + "_blocks"] = rng.integers(0, 256, (3, n_out, n_in // 32, 16), np.uint8)
        out[name + "_scales"] = rng.integers(118, 124, (3, n_out, n_in // 32), np.uint8)
    return out


def write(directory: Path, change: dict[str, np.ndarray | None] | None = None) -> Path:
    directory.mkdir()
    source = random_checkpoint(CONFIG, seed=1).tensors
    tensors = {n: source.read(n) for n in source.names() if n not in (UP, DOWN)}
    tensors |= packed() | (change or {})
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items() if t is not None}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def by_definition(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(experts, in, out) in float64: sign, two bits of exponent with bias 1, one of mantissa."""
    out = np.zeros((blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1]))
    for e, n, g, j in np.ndindex(blocks.shape):
        for half in range(2):
            code = int(blocks[e, n, g, j]) >> 4 * half & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            out[e, 32 * g + 2 * j + half, n] = (-size if code & 8 else size) * 2.0 ** (int(scales[e, n, g]) - 127)
    return out


def test_matrices_are_what_the_codes_stand_for_in_whole_and_in_parts(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "m")) as opened:
        for name in (UP, DOWN):
            expected = by_definition(packed()[name + "_blocks"], packed()[name + "_scales"])
            np.testing.assert_array_equal(opened.tensors.read(name), expected)
            np.testing.assert_array_equal(opened.tensors.read_rows(name, 1, 2), expected[1:2])
            np.testing.assert_array_equal(opened.tensors.read_part(name, (2, slice(3, 9), slice(1, 20, 2))), expected[2, 3:9, 1:20:2])
            assert opened.tensors.dtype(name) == "bfloat16"
        assert not any(n.endswith(("_blocks", "_scales")) for n in opened.tensors.names())


def test_the_smallest_and_the_largest_scales_are_exact() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = decode(blocks, np.zeros(16, np.uint8))
    np.testing.assert_array_equal(values[0, :4], np.array([0, 0, 0.5, 0], np.float32) * np.float32(2.0**-127))
    largest = decode(np.full((1, 16), 0x43, np.uint8), np.full(1, 254, np.uint8))
    np.testing.assert_array_equal(largest[0, :2], [np.float32(1.5 * 2.0**127), np.inf])


def test_what_is_saved_is_plain_and_the_same(tmp_path: Path) -> None:
    ids = np.arange(7)
    model = wse.from_pretrained(write(tmp_path / "m"), wafer=wse.Wafer(wse.WSE3, rows=4, cols=4), cache_dir=tmp_path / "c")
    saved, logits = model.save(tmp_path / "plain"), model(ids).logits
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    plain = wse.from_pretrained(saved, wafer=wse.Wafer(wse.WSE3, rows=4, cols=4), cache_dir=tmp_path / "c")
    np.testing.assert_array_equal(plain(ids).logits, logits)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    good = packed()
    bad_scale = good[DOWN + "_scales"].copy()
    bad_scale[1, 5, 1] = 255
    for i, (change, message) in enumerate([
        ({UP + "_scales": good[UP + "_scales"][:, :-1]}, r"gate_up_proj: blocks must have shape \(experts, out, in / 32, 16\)"),
        ({UP + "_scales": good[UP + "_scales"].astype(np.float32)}, "gate_up_proj_scales is stored as float32; MXFP4 is bytes, U8"),
        ({UP + "_scales": None}, r"gate_up_proj_blocks is there, but .*gate_up_proj_scales is missing; MXFP4 is a pair of both"),
        ({DOWN + "_blocks": None}, r"down_proj_scales is there, but .*down_proj_blocks is missing"),
        ({DOWN + n: good[DOWN + n][:, :-1] for n in ("_blocks", "_scales")}, r"down_proj has shape \(3, 192, 31\), config\.json asks for"),
    ]):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(write(tmp_path / str(i), change))
    with open_checkpoint(write(tmp_path / "scale", {DOWN + "_scales": bad_scale})) as opened:
        assert isinstance(opened.tensors, Mxfp4Tensors)
        with pytest.raises(CheckpointError, match=r"down_proj_scales\[1\]: output 5 of those read, block 1: 255 stands for no number"):
            opened.tensors.read(DOWN)
    with pytest.raises(ConfigError, match="`quant_method` must be 'mxfp4' or 'fp8' for this family; or use a float32"):
        parse_config({**CONFIG, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ConfigError, match="`quant_method` must be 'fp8' for this family"):
        parse_config({**CONFIG, "model_type": "mixtral"})


def test_an_expert_is_decoded_once_for_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    right = Mxfp4Tensors.read_part
    monkeypatch.setattr(Mxfp4Tensors, "read_part", lambda self, name, key: asked.append((name, str(key))) or right(self, name, key))
    with open_checkpoint(write(tmp_path / "m")) as opened:
        layout = Layout(opened.tensors, opened.spec, "here")
        for weight in all_weights(opened.spec):
            for _ in layout.chunks(weight):
                pass
    of_experts = [one for one in asked if one[0] in (UP, DOWN)]
    assert len(of_experts) == len(set(of_experts)) == 3 * 3
