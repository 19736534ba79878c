"""What a matrix weighs in the stream: as the checkpoint stores it, in the ledger of a run and in a plan from its config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint, published_names, random_checkpoint, save_checkpoint
from wse_emu.checkpoint.fp8_config import fp8_format
from wse_emu.checkpoint.safetensors_file import SafetensorsFile
from wse_emu.checkpoint.stored import bytes_by_config
from wse_emu.engine.plan import plan_model
from wse_emu.foundation.weights import all_weights
from wse_emu.memoryx import DiskBytes

from ..checkpoint import test_fp8, test_mxfp4

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "eos_token_id": None,
}  # fmt: skip


def made(kind: str, path: Path) -> Path:
    if kind == "fp8":
        return test_fp8.write(path, test_fp8.tensors()[0])
    if kind == "mxfp4":
        return test_mxfp4.write(path)
    with random_checkpoint(MIXTRAL, 1) as checkpoint:
        return save_checkpoint(checkpoint, path, dtype=kind)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "mxfp4"])
def test_all_matrices_together_are_the_bytes_of_their_files(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "m")
    file = SafetensorsFile(path / "model.safetensors")
    with open_checkpoint(path) as checkpoint:
        disk = DiskBytes(checkpoint.tensors.stored_bytes, checkpoint.spec)
        matrices = [w for w in all_weights(checkpoint.spec) if len(w.shape) > 1]
        total = sum(disk(w.name) for w in matrices)
        vectors = {t.name for t in published_names(checkpoint.spec).values() if len(t.shape) == 1}
        stored = sum(entry.nbytes for name, entry in file.entries.items() if name not in vectors)
        assert stored <= total <= stored + 4 * checkpoint.spec.num_layers, "a matrix in two parts rounds each up"
        sizes = {w.name: w.size for w in matrices}
        if kind == "mxfp4":
            name = "layers.0.experts.1.w_down"
            assert disk(name) == sizes[name] // 2 + sizes[name] // 32
            assert disk("layers.0.w_o") == 4 * sizes["layers.0.w_o"]
        if kind == "fp8":
            name, form = "layers.1.experts.2.w_down", fp8_format(checkpoint.config, "")
            assert form is not None
            assert form.block is not None
            block = form.block
            assert disk(name) == sizes[name] + 4 * math.ceil(20 / block[0]) * math.ceil(9 / block[1])
            assert disk("lm_head") == 4 * sizes["lm_head"]
        if kind == "bfloat16":
            assert all(disk(name) == 2 * size for name, size in sizes.items())
        by_config = DiskBytes(bytes_by_config(checkpoint.config, checkpoint.spec), checkpoint.spec)
        assert {name: by_config(name) for name in sizes} == {name: disk(name) for name in sizes}
    file.close()


@pytest.mark.parametrize("kind", ["bfloat16", "fp8", "mxfp4"])
def test_a_run_counts_so_on_every_executor_and_a_plan_says_it_before(kind: str, tmp_path: Path) -> None:
    path, ids, seen = made(kind, tmp_path / "m"), [1, 2, 3, 4], []
    for executor in ("batched", "isolated", "dry"):
        wafer = wse.Wafer(wse.WSE3, rows=2, cols=3, executor=executor)
        model = wse.from_pretrained(path, wafer=wafer, stream_experts="all", cache_dir=tmp_path / "cache")
        for _ in range(2):  # the second time from what is known
            start = len(wafer.ledger)
            model(ids)
            seen.append([e for e in wafer.ledger.events(start) if e.kind == "stream"])
        disk = DiskBytes(model.checkpoint.tensors.stored_bytes, model.spec)
        for event in seen[-1]:
            shape = next(w.shape for w in all_weights(model.spec) if w.name == event.name)
            if len(shape) == 2:
                assert event.bytes == disk(event.name), event
                assert event.wavelets == math.prod(shape)
        model.close()
    assert all(events == seen[0] for events in seen)
    one = wse.from_pretrained(path, wafer=wse.Wafer(wse.WSE3, rows=1, cols=1, executor="dry"), stream_experts="all", chunk=2)
    one(ids)  # a plan counts vectors once, that some columns of cores share
    config, shape = dict(one.checkpoint.config), {"rows": 2, "cols": 3, "prompt_tokens": 4, "new_tokens": 1, "options": one.options}
    plan = plan_model(one.spec, **shape, config=config)
    assert plan.stream_bytes_prefill == sum(e.bytes for e in one.wafer.ledger.events() if e.kind == "stream")
    assert plan_model(one.spec, **shape).stream_bytes_prefill > plan.stream_bytes_prefill
    one.close()


def test_what_config_says_of_types(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((made("bfloat16", tmp_path / "m") / "config.json").read_text())
    with random_checkpoint(MIXTRAL, 1) as checkpoint:
        name = "model.embed_tokens.weight"
        for changes, width in (({}, 2), ({"torch_dtype": "float16"}, 2), ({"torch_dtype": "float32"}, 4), ({"torch_dtype": None}, 4)):
            told = {**config, "dtype": None, "torch_dtype": "bfloat16", **changes}
            assert bytes_by_config(told, checkpoint.spec)(name) == width * 60 * 24
        assert bytes_by_config(MIXTRAL, checkpoint.spec)(name) == 4 * 60 * 24
