"""Checkpoints as they are saved: what is in the files, what is never overwritten, and nothing half done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import wse_emu as wse
from wse_emu.checkpoint import Checkpoint, open_checkpoint, published_tensors, random_checkpoint, save_checkpoint, to_config
from wse_emu.checkpoint import replace as replace_module
from wse_emu.foundation.errors import CheckpointError, SaveError, SpecError
from wse_emu.testing import contract_specs, write_checkpoint

INDEX = "model.safetensors.index.json"
ROUNDED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BASE = {
    "vocab_size": 131, "hidden_size": 22, "intermediate_size": 26, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 1e4, "eos_token_id": [2, 5],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "tie_word_embeddings": True, "attention_dropout": 0.1},
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 5},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3": {**BASE, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {
        **BASE, "model_type": "qwen3_moe", "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
}  # fmt: skip


@pytest.fixture
def mixtral() -> Checkpoint:
    return random_checkpoint(contract_specs()["mixtral"], seed=3)


def no_rests(directory: Path) -> bool:
    """Whether nothing hidden was left behind."""
    return not [p for p in directory.iterdir() if p.name.startswith(".")]


def as_library_reads(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of every file, by the format's own library."""
    out: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        part = load_file(file)
        assert not out.keys() & part.keys()
        out |= part
        with safe_open(file, "np") as f:
            assert f.metadata() == {"format": "pt"}
    return out


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_tensor_is_stored_rounded_to_nearest(family: str, dtype: Any, max_shard_bytes: int, tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS[family], seed=3)
    directory = save_checkpoint(source, tmp_path / "a" / "b", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert directory == tmp_path / "a" / "b"
    assert no_rests(tmp_path / "a")
    stored = as_library_reads(directory)
    assert sorted(stored) == sorted(source.tensors.names())
    for name, values in stored.items():
        assert values.dtype == ROUNDED[dtype]
        np.testing.assert_array_equal(values, source.tensors.read(name).astype(ROUNDED[dtype]))
    with open_checkpoint(directory) as opened:
        assert opened.spec == source.spec
        for name in source.tensors.names():
            np.testing.assert_array_equal(opened.tensors.read(name), stored[name].astype(np.float32))
    assert (directory / INDEX).exists() == (max_shard_bytes == 20_000)


def test_files_are_filled_up_to_the_limit_and_no_further(mixtral: Checkpoint, tmp_path: Path) -> None:
    sizes = {t.name: 2 * int(np.prod(t.shape)) for _, t in published_tensors(mixtral.spec)}
    limit = 6000  # head and embedding are larger than one file may be
    save_checkpoint(mixtral, tmp_path / "m", dtype="bfloat16", max_shard_bytes=limit)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": mixtral.spec.n_params, "total_size": sum(sizes.values())}
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    held = [sorted(name for name, file in index["weight_map"].items() if file == f) for f in files]
    for names, following in zip(held, [*held[1:], None], strict=True):
        size = sum(sizes[n] for n in names)
        assert size <= limit or len(names) == 1
        assert following is None or size + max(sizes[n] for n in following) > limit
    assert sum(map(len, held)) == len(sizes)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_config_is_that_of_a_released_checkpoint(family: str, tmp_path: Path) -> None:
    source = random_checkpoint(CONFIGS[family], seed=0)
    config = json.loads((save_checkpoint(source, tmp_path / "m", dtype="bfloat16") / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 1e4
    assert not {"rope_parameters", "dtype"} & set(config)
    assert config["eos_token_id"] == [2, 5]
    assert config.get("attention_dropout") == CONFIGS[family].get("attention_dropout")
    names = {"num_local_experts", "num_experts"} & set(config)
    assert names == {"mixtral": {"num_local_experts"}, "qwen3_moe": {"num_experts"}}.get(family, set())


def test_by_default_every_tensor_keeps_its_type(mixtral: Checkpoint, tmp_path: Path) -> None:
    wide = "model.layers.1.input_layernorm.weight"
    norm = mixtral.tensors.read(wide)
    write_checkpoint(mixtral, tmp_path / "mixed", dtype="bfloat16", replace={wide: norm})
    with open_checkpoint(tmp_path / "mixed") as opened:
        save_checkpoint(opened, tmp_path / "copy")
        stored = as_library_reads(tmp_path / "copy")
        assert {str(v.dtype) for n, v in stored.items() if n != wide} == {"bfloat16"}
        assert stored[wide].dtype == np.float32
        np.testing.assert_array_equal(stored[wide], norm)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    header = json.loads((tmp_path / "copy" / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    sizes = {"F32": 4, "BF16": 2}
    assert all(v["data_offsets"][0] % sizes[v["dtype"]] == 0 for n, v in header.items() if n != "__metadata__")


def test_a_copy_brings_the_tokenizer_and_what_else_belongs_to_it(tmp_path: Path) -> None:
    shipped = Path(wse.__file__).parent / "data" / "pydoc-moe-8x2"
    with open_checkpoint(shipped) as opened:
        copy = save_checkpoint(opened, tmp_path / "copy", max_shard_bytes=200_000)
        for name in ("tokenizer.json", "LICENSE"):
            assert (copy / name).read_bytes() == (shipped / name).read_bytes()
        with open_checkpoint(copy) as again:
            assert again.spec == opened.spec
            assert again.tokenizer_path == copy.resolve() / "tokenizer.json"
            for name in opened.tensors.names():
                assert again.tensors.dtype(name) == opened.tensors.dtype(name)
                np.testing.assert_array_equal(again.tensors.read(name), opened.tensors.read(name))


def test_saving_twice_gives_the_same_bytes(mixtral: Checkpoint, tmp_path: Path) -> None:
    a, b = (save_checkpoint(mixtral, tmp_path / n, dtype="float16", max_shard_bytes=9000) for n in "ab")
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    assert all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


def test_a_saved_model_computes_the_same_bits(tmp_path: Path) -> None:
    model = wse.from_config(CONFIGS["qwen3_moe"], seed=1, wafer=wse.Wafer(wse.WSE3, rows=3, cols=4))
    ids = np.random.default_rng(0).integers(0, 131, (2, 9))
    again = wse.from_pretrained(model.save(tmp_path / "m"), wafer=wse.Wafer(wse.WSE3, rows=3, cols=4), cache_dir=tmp_path)
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)


def test_saving_holds_a_few_megabytes_however_large_the_model(tmp_path: Path) -> None:
    """48 MB of bfloat16, 96 MB as the wafer would have it, with tensors of 16 MB; building the model is included."""
    config = {**CONFIGS["llama"], "vocab_size": 16_000, "hidden_size": 500, "intermediate_size": 3500, "tie_word_embeddings": False}
    make = wse.from_config  # which imports much
    tracemalloc.start()
    try:
        make(config, seed=0).save(tmp_path / "m", dtype="bfloat16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 48e6
    assert peak < 20e6  # a piece of 4 MB: drawn, copied, rounded, and widened again to be checked


# ---- what is never overwritten


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_an_empty_directory_is_filled_and_keeps_its_mode(mixtral: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir(mode=0o750)
    save_checkpoint(mixtral, target)
    assert target.stat().st_mode & 0o777 == 0o750
    assert open_checkpoint(target).spec == mixtral.spec


def test_a_directory_with_files_is_refused_and_untouched(mixtral: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(mixtral, tmp_path / "m")
    before = content(tmp_path / "m")
    with pytest.raises(SaveError, match="m: is not empty; choose another directory, or `overwrite=True`"):
        save_checkpoint(mixtral, tmp_path / "m", dtype="float16")
    assert content(tmp_path / "m") == before
    assert no_rests(tmp_path)


def test_overwriting_replaces_a_checkpoint_as_a_whole(mixtral: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(mixtral, tmp_path / "m", max_shard_bytes=9000)
    save_checkpoint(mixtral, tmp_path / "m", dtype="float16", overwrite=True)
    assert sorted(content(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert no_rests(tmp_path)


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoint-2", ".git"])
def test_a_directory_that_holds_anything_else_is_never_replaced(name: str, mixtral: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(mixtral, tmp_path / "m")
    (tmp_path / "m" / name).mkdir() if name != "thesis.tex" else (tmp_path / "m" / name).write_text("years of work")
    before = sorted(p.name for p in (tmp_path / "m").iterdir())
    with pytest.raises(SaveError, match=f"holds {name}, which would be lost and is no part of a checkpoint"):
        save_checkpoint(mixtral, tmp_path / "m", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == before


def test_a_directory_with_the_name_of_a_file_of_ours_is_not_replaced(mixtral: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "m" / "all.safetensors").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"holds all\.safetensors, which would be lost"):
        save_checkpoint(mixtral, tmp_path / "m", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite: bool, mixtral: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    with pytest.raises(SaveError, match="m: is there and not a directory"):
        save_checkpoint(mixtral, tmp_path / "m", overwrite=overwrite)
    assert (tmp_path / "m").read_text() == "x"


def test_the_working_directory_is_refused(mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match="is the working directory"):
        save_checkpoint(mixtral, ".")
    save_checkpoint(mixtral, "below")
    assert open_checkpoint("below").spec == mixtral.spec


def test_a_link_keeps_pointing_to_what_is_replaced(mixtral: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(mixtral, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced there")
def test_a_checkpoint_can_be_saved_over_itself(mixtral: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(mixtral, tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as opened:
        save_checkpoint(opened, tmp_path / "m", dtype="bfloat16", overwrite=True)
    with open_checkpoint(tmp_path / "m") as again:
        for name in mixtral.tensors.names():
            assert again.tensors.dtype(name) == "bfloat16"
            expected = mixtral.tensors.read(name).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(again.tensors.read(name), expected)


# ---- nothing half done


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("there", [False, True])
def test_after_an_interruption_everything_is_as_before(
    there: bool, error: type[BaseException], mixtral: Checkpoint, tmp_path: Path
) -> None:  # fmt: skip
    target = tmp_path / "m"
    if there:
        save_checkpoint(mixtral, target)
    before = content(target) if there else None
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if done > total // 2:
            raise error

    with pytest.raises(error):
        save_checkpoint(mixtral, target, dtype="float16", max_shard_bytes=9000, overwrite=True, progress=stop)
    assert calls > 3
    assert (content(target) if there else None) == before
    assert target.exists() == there
    assert no_rests(tmp_path)


def failing_rename(monkeypatch: pytest.MonkeyPatch, which: int, error: BaseException) -> None:
    """Make the `which`-th rename of a save fail."""
    real, calls = os.rename, 0

    def rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == which:
            raise error
        real(source, target)

    monkeypatch.setattr(replace_module.os, "rename", rename)


@pytest.mark.parametrize("error", [OSError(errno.ENOTEMPTY, "Directory not empty"), KeyboardInterrupt()])
@pytest.mark.parametrize("which", [1, 2])
def test_when_it_cannot_take_its_name_the_old_one_has_it_back(
    which: int, error: BaseException, mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(mixtral, tmp_path / "m")
    before = content(tmp_path / "m")
    failing_rename(monkeypatch, which, error)
    with pytest.raises((SaveError, KeyboardInterrupt)):
        save_checkpoint(mixtral, tmp_path / "m", dtype="float16", overwrite=True)
    assert content(tmp_path / "m") == before
    assert no_rests(tmp_path)


def test_progress_ends_at_all_bytes(mixtral: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    save_checkpoint(mixtral, tmp_path / "m", dtype="bfloat16", max_shard_bytes=9000, progress=lambda *s: seen.append(s))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {2 * mixtral.spec.n_params}
    assert seen[-1][0] == seen[-1][1]


def test_too_little_space_is_said_before_anything_is_written(mixtral: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SaveError, match=rf"need {4 * mixtral.spec.n_params} bytes, 1000 are free; choose another directory"):
        save_checkpoint(mixtral, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_what_the_file_system_refuses_is_said(mixtral: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"file/m: cannot be written: .*; nothing was saved"):
        save_checkpoint(mixtral, tmp_path / "file" / "m")


# ---- what cannot be stored


@pytest.fixture
def damaged(mixtral: Checkpoint, tmp_path: Path) -> Iterator[Checkpoint]:
    """A checkpoint with one value that is large, and another that is not a number."""
    large, nan = mixtral.tensors.read("model.norm.weight").copy(), mixtral.tensors.read("lm_head.weight").copy()
    large[7], nan[130, 3] = 65_520.0, np.nan  # 65,519 is the last float16 rounds down
    write_checkpoint(mixtral, tmp_path / "damaged", replace={"model.norm.weight": large, "lm_head.weight": nan})
    with open_checkpoint(tmp_path / "damaged") as opened:
        yield opened


def test_a_value_beyond_the_type_is_named(damaged: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight\[7\] is 65520\.0; the largest value of float16 is 65504; choose another"):
        save_checkpoint(damaged, tmp_path / "m", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_value_that_is_not_finite_is_named(dtype: Any, damaged: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\[130, 3\] is nan; weights must be finite"):
        save_checkpoint(damaged, tmp_path / "m", dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "`dtype` must be one of float32, bfloat16, float16 or None, got 'fp8'"),
        ({"max_shard_bytes": 0}, "`max_shard_bytes` must be an integer >= 1, got 0"),
        ({"max_shard_bytes": 5e9}, "`max_shard_bytes` must be an integer >= 1, got 5000000000.0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str, mixtral: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        save_checkpoint(mixtral, tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_a_model_ignores_are_left_out(tmp_path: Path) -> None:
    tied = random_checkpoint(contract_specs()["llama-tied"], seed=3)
    head, frequencies = tied.tensors.read("model.embed_tokens.weight"), np.ones(5, np.float32)
    more = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    write_checkpoint(tied, tmp_path / "old", replace=more)
    with open_checkpoint(tmp_path / "old") as opened:
        stored = as_library_reads(save_checkpoint(opened, tmp_path / "new"))
    assert sorted(stored) == list(tied.tensors.names())


def test_config_of_a_spec_alone_is_enough(tmp_path: Path) -> None:
    spec = contract_specs()["mixtral"]
    saved = wse.from_config(spec, seed=2).save(tmp_path / "m")
    assert json.loads((saved / "config.json").read_text()) == {**to_config(spec), "torch_dtype": "float32"}
