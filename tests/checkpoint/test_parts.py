"""Roles that lie in a larger tensor: where, and that only the part is read; what is left out, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from wse_emu.checkpoint import Checkpoint, names, open_checkpoint, parse_config, published_names, random_checkpoint, save_checkpoint
from wse_emu.checkpoint.family import Family
from wse_emu.checkpoint.names import read_part
from wse_emu.checkpoint.naming import Part, named
from wse_emu.foundation.errors import CheckpointError
from wse_emu.foundation.weights import all_weights
from wse_emu.memoryx.layout import Layout
from wse_emu.reference import tensors
from wse_emu.reference.weights import PublishedWeights

GRANITE: dict[str, Any] = {
    "model_type": "granitemoe", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
GATE_UP = ("w_gate", "w_up")
ROLES = ("w_q", "w_k", "w_v")
ARRANGEMENTS: dict[str, dict[str, Part]] = {
    "axis": {
        "experts__w_gate": Part(name="gu", stacked=GATE_UP, experts="axis"),
        "experts__w_up": Part(name="gu", stacked=GATE_UP, experts="axis"),
        "experts__w_down": Part(name="d", experts="axis"),
    },
    "axis, transposed": {
        "experts__w_gate": Part(name="gu", stacked=GATE_UP, experts="axis", transposed=True),
        "experts__w_up": Part(name="gu", stacked=GATE_UP, experts="axis", transposed=True),
        "experts__w_down": Part(name="d", experts="axis", transposed=True),
    },
    "axis, transposed, interleaved": {
        "experts__w_gate": Part(name="gu", stacked=GATE_UP, experts="axis", transposed=True, interleaved=True),
        "experts__w_up": Part(name="gu", stacked=GATE_UP, experts="axis", transposed=True, interleaved=True),
        "experts__w_down": Part(name="d", experts="axis"),
    },
    "rows, and one tensor of queries, keys and values": {
        "experts__w_gate": Part(name="g", experts="rows"),
        "experts__w_up": Part(name="u", experts="rows"),
        "experts__w_down": Part(name="d", experts="rows", transposed=True),
        **{role: Part(name="qkv", stacked=ROLES) for role in ROLES},
    },
}
"""How published files fuse, by role."""


def expected_part(whole: np.ndarray, arrangement: str, role: str, expert: int) -> np.ndarray:
    """An expert's matrix (out, in), written again."""
    e, h, f = 3, 12, 5
    if arrangement.startswith("rows"):
        block = whole.reshape(e, f, h)[expert]
        return block.T if role == "w_down" else block
    block = whole[expert]
    if "transposed" in arrangement and not (role == "w_down" and "interleaved" in arrangement):
        block = block.T
    if role == "w_down":
        return block
    which = GATE_UP.index(role)
    return block[which::2] if "interleaved" in arrangement else block[which * f : (which + 1) * f]


@pytest.fixture(params=list(ARRANGEMENTS))
def arrangement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family that fuses so."""
    family = names.FAMILIES["granitemoe"]
    fields = {name: getattr(family, name) for name in Family.__dataclass_fields__}
    table = MappingProxyType({**names.FAMILIES, "granitemoe": Family(**{**fields, "names": named(**ARRANGEMENTS[request.param])})})
    for module in ("names", "directory", "config"):
        monkeypatch.setattr(f"wse_emu.checkpoint.{module}.FAMILIES", table)
    return str(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_is_read_by_itself_from_memory_and_from_files(arrangement: str, dtype: Any, tmp_path: Path) -> None:
    source = random_checkpoint(parse_config(GRANITE), seed=1)
    directory = save_checkpoint(source, tmp_path / "m", dtype=dtype)
    with open_checkpoint(directory) as opened:
        assert opened.ignored == ()
        for role, tensor in published_names(source.spec).items():
            if ".experts." not in role:
                continue
            expert, matrix = int(role.split(".")[3]), role.rpartition(".")[2]
            whole = source.tensors.read(tensor.name)
            assert whole.shape == tensor.whole
            expected = expected_part(whole, arrangement, matrix, expert)
            assert expected.shape == tensor.shape
            np.testing.assert_array_equal(read_part(source.tensors, tensor, 1, 4), expected[1:4])
            stored = expected if dtype == "float32" else expected.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(read_part(opened.tensors, tensor, 0, tensor.shape[0]), stored)
            assert read_part(opened.tensors, tensor, 2, 3).flags.c_contiguous
    if arrangement.startswith("rows"):
        n_q, n_kv = 12, 6
        qkv = source.tensors.read("model.layers.1.qkv")
        for role, start, stop in (("w_q", 0, n_q), ("w_k", n_q, n_q + n_kv), ("w_v", n_q + n_kv, n_q + 2 * n_kv)):
            tensor = published_names(source.spec)["layers.1." + role]
            np.testing.assert_array_equal(read_part(source.tensors, tensor, 0, stop - start), qkv[start:stop])


def test_the_layout_holds_the_parts(arrangement: str) -> None:
    source = random_checkpoint(parse_config(GRANITE), seed=1)
    layout, published = Layout(source.tensors, source.spec, "here"), published_names(source.spec)
    for weight in all_weights(source.spec):
        if weight.name.endswith("experts.2.w_gate_up"):
            flat = np.concatenate(list(layout.chunks(weight))).reshape(weight.shape)
            gate, up = (
                expected_part(source.tensors.read(published[weight.name.replace("w_gate_up", r)].name), arrangement, r, 2) for r in GATE_UP
            )
            np.testing.assert_array_equal(flat[:, ::2], gate.T)
            np.testing.assert_array_equal(flat[:, 1::2], up.T)


def write(directory: Path, checkpoint: Checkpoint, changes: dict[str, np.ndarray | None]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    values = {name: checkpoint.tensors.read(name) for name in checkpoint.tensors.names()} | changes
    save_file({name: value for name, value in values.items() if value is not None}, directory / "model.safetensors")
    return directory


def test_missing_extra_and_ignored_tensors_are_named(tmp_path: Path) -> None:
    source, one = random_checkpoint(GRANITE, seed=1), np.zeros(3, np.float32)
    fused = "model.layers.1.block_sparse_moe.input_linear.weight"
    with pytest.raises(CheckpointError, match=f"are missing: {fused}"):
        open_checkpoint(write(tmp_path / "a", source, {fused: None}))
    with pytest.raises(CheckpointError, match=r"does not promise: model\.layers\.0\.mtp\.weight, model\.layers\.7\.extra"):
        open_checkpoint(write(tmp_path / "b", source, {"model.layers.7.extra": one, "model.layers.0.mtp.weight": one}))
    with pytest.raises(CheckpointError, match=r"input_linear\.weight has shape \(3, 9, 12\), config\.json asks for \(3, 10, 12\)"):
        open_checkpoint(write(tmp_path / "c", source, {fused: np.zeros((3, 9, 12), np.float32)}))
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with open_checkpoint(write(tmp_path / "d", source, {old: one})) as opened:
        assert opened.ignored == (old,)


def test_layers_behind_the_last_are_left_out_where_the_family_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, one = random_checkpoint(GRANITE, seed=1), np.zeros(3, np.float32)
    family = names.FAMILIES["granitemoe"]
    fields = {name: getattr(family, name) for name in Family.__dataclass_fields__}
    table = MappingProxyType({**names.FAMILIES, "granitemoe": Family(**{**fields, "predicts_further": True})})
    monkeypatch.setattr("wse_emu.checkpoint.directory.FAMILIES", table)
    extra = "model.layers.2.eh_proj.weight"
    with open_checkpoint(write(tmp_path / "a", source, {extra: one})) as opened:
        assert opened.ignored == (extra,)


def test_the_reference_finds_the_parts_by_its_own_table() -> None:
    source = random_checkpoint(GRANITE, seed=1)
    weights = PublishedWeights(source.spec, source.tensors.read, np.dtype(np.float32))
    for role, tensor in published_names(source.spec).items():
        if ".experts." in role:
            layer, expert, matrix = int(role.split(".")[1]), int(role.split(".")[3]), role.rpartition(".")[2]
            expected = read_part(source.tensors, tensor, 0, tensor.shape[0])
            np.testing.assert_array_equal(weights.layer(layer, matrix, expert), expected)
            assert tensors.layer_tensor(source.spec, layer, matrix, expert).shape == tensor.shape
