"""Directories as people have them, and as nobody should: shards, types, missing and foreign files, damage."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import Checkpoint, open_checkpoint, published_names, random_checkpoint
from wse_emu.checkpoint import directory as directory_module
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.foundation.errors import CheckpointError, ConfigError
from wse_emu.foundation.norm_spec import NormSpec
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.testing import contract_specs, write_checkpoint

INDEX = "model.safetensors.index.json"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROUNDED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(params=list(contract_specs()))
def source(request: pytest.FixtureRequest) -> Checkpoint:
    return random_checkpoint(contract_specs()[request.param], seed=3)


@pytest.fixture
def mixtral() -> Checkpoint:
    return random_checkpoint(contract_specs()["mixtral"], seed=3)


@pytest.fixture
def tied() -> Checkpoint:
    return random_checkpoint(contract_specs()["llama-tied"], seed=3)


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", list(ROUNDED))
def test_every_tensor_is_read_and_widened_exactly(source: Checkpoint, tmp_path: Path, dtype: str, n_shards: int) -> None:
    write_checkpoint(source, tmp_path, dtype=dtype, n_shards=n_shards)  # type: ignore[arg-type]
    with open_checkpoint(tmp_path) as opened:
        assert opened.spec == source.spec
        assert opened.path == tmp_path.resolve()
        assert opened.name == tmp_path.name
        assert list(opened.tensors.names()) == sorted({t.name for t in published_names(source.spec).values()})
        for tensor in published_names(source.spec).values():
            expected = source.tensors.read(tensor.name).astype(ROUNDED[dtype]).astype(np.float32)
            value = opened.tensors.read(tensor.name)
            assert opened.tensors.dtype(tensor.name) == dtype
            assert opened.tensors.shape(tensor.name) == value.shape == tensor.shape
            assert value.dtype == np.float32
            assert value.flags.aligned
            assert not value.flags.writeable
            np.testing.assert_array_equal(value, expected)
            np.testing.assert_array_equal(opened.tensors.read_rows(tensor.name, 1, 3), expected[1:3])


def test_bfloat16_and_float16_widen_every_code_exactly(tied: Checkpoint, tmp_path: Path) -> None:
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(1024, 64)
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        config = {**tied.config, "vocab_size": 1024, "hidden_size": 64}
        wide = random_checkpoint(config, seed=0)
        directory = write_checkpoint(wide, tmp_path / str(dtype), replace={"model.embed_tokens.weight": codes.view(dtype)})
        value = open_checkpoint(directory).tensors.read("model.embed_tokens.weight")
        with np.errstate(invalid="ignore"):
            expected = codes.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(value, expected)
        signs = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(value)[signs], np.signbit(expected)[signs])


def test_arrays_outlive_the_checkpoint_and_later_reads_raise(tied: Checkpoint, tmp_path: Path) -> None:
    opened = open_checkpoint(write_checkpoint(tied, tmp_path))
    value = opened.tensors.read("model.norm.weight")
    opened.close()
    opened.close()
    np.testing.assert_array_equal(value, tied.tensors.read("model.norm.weight"))
    del value
    opened.close()
    with pytest.raises(CheckpointError, match="after the checkpoint was closed"):
        opened.tensors.read("model.norm.weight")


def test_unknown_tensor_and_rows_outside_raise(tied: Checkpoint, tmp_path: Path) -> None:
    for tensors in (tied.tensors, open_checkpoint(write_checkpoint(tied, tmp_path)).tensors):
        with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
            tensors.read("nothing")
        with pytest.raises(CheckpointError, match="rows"):
            tensors.read_rows("model.norm.weight", 0, 1000)
        with pytest.raises(CheckpointError, match="rows"):
            tensors.read_rows("model.norm.weight", -1, 2)


def test_tokenizer_is_found(tied: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tied, tmp_path)
    assert open_checkpoint(tmp_path).tokenizer_path is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_checkpoint(tmp_path).tokenizer_path == tmp_path.resolve() / "tokenizer.json"


def test_symbolic_links_of_a_download_cache_are_followed(tied: Checkpoint, tmp_path: Path) -> None:
    written = write_checkpoint(tied, tmp_path / "models--some--model" / "blobs")
    snapshot = written.parent / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (written / name).rename(written / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    assert open_checkpoint(snapshot).fingerprint == open_checkpoint(write_checkpoint(tied, tmp_path / "plain")).fingerprint


def test_fingerprint_is_by_content_and_sees_every_file(tied: Checkpoint, tmp_path: Path) -> None:
    a, b = (open_checkpoint(write_checkpoint(tied, tmp_path / n)) for n in "ab")
    assert a.fingerprint == b.fingerprint
    assert a.tensors.fingerprint == b.tensors.fingerprint
    seen = {a.fingerprint}
    for name, content in (("tokenizer.json", "{}"), ("generation_config.json", "{}"), ("tokenizer.json", "{ }")):
        (tmp_path / "a" / name).write_text(content)
        again = open_checkpoint(tmp_path / "a")
        assert again.tensors.fingerprint == a.tensors.fingerprint
        seen.add(again.fingerprint)
    file = tmp_path / "a" / "model.safetensors"
    info = file.stat()
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    last = open_checkpoint(tmp_path / "a")
    assert last.tensors.fingerprint != a.tensors.fingerprint
    seen.add(last.fingerprint)
    assert len(seen) == 5


def test_fingerprint_of_large_weights_follows_size_and_times(tied: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_HASH_WHOLE_BYTES", 0)
    file = write_checkpoint(tied, tmp_path) / "model.safetensors"
    first = open_checkpoint(tmp_path).tensors.fingerprint
    assert open_checkpoint(tmp_path).tensors.fingerprint == first
    assert first.startswith("files-")
    with open(file, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x01")
    os.utime(file, ns=(1, 1))
    assert open_checkpoint(tmp_path).tensors.fingerprint != first


def test_no_such_directory_says_that_nothing_is_downloaded(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", "some-org/some-model", "nul\0byte"):
        with pytest.raises(ConfigError, match=r"never downloaded|`path` must be a path"):
            open_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_files_are_never_opened(tied: Checkpoint, tmp_path: Path, name: str) -> None:
    (write_checkpoint(tied, tmp_path) / "model.safetensors").unlink()
    os.mkfifo(tmp_path / name)  # opening it would hang
    with pytest.raises(CheckpointError, match=f"{name}; pickle files can run any code and are never opened"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tied: Checkpoint, tmp_path: Path) -> None:
    file = write_checkpoint(tied, tmp_path) / "model.safetensors"
    file.rename(tmp_path / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor .*; weights\.safetensors are not names that a checkpoint uses"
    ):
        open_checkpoint(tmp_path)


def test_fifo_in_place_of_a_file_is_refused_at_once(tied: Checkpoint, tmp_path: Path) -> None:
    for name, error in (("model.safetensors", CheckpointError), ("config.json", ConfigError)):
        directory = write_checkpoint(tied, tmp_path / name)
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(error, match="not a regular file"):
            open_checkpoint(directory)


def test_missing_and_extra_tensors_are_listed_by_name(mixtral: Checkpoint, tmp_path: Path) -> None:
    down = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    with pytest.raises(CheckpointError, match=f"promises are missing: {down}, lm_head.weight|lm_head.weight.*{down}"):
        open_checkpoint(write_checkpoint(mixtral, tmp_path / "a", replace={down: None, "lm_head.weight": None}))
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(120, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"does not promise: model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_checkpoint(write_checkpoint(mixtral, tmp_path / "b", replace=extra))
    with pytest.raises(CheckpointError, match=r"are missing: .*\.experts\.0\..* and \d+ more"):
        open_checkpoint(write_checkpoint(mixtral, tmp_path / "c", config={**mixtral.config, "num_hidden_layers": 50}))


OWN_RULES: dict[str, dict[str, Any]] = {
    "phimoe": {
        "norm": NormSpec(kind="layer", bias=True),
        "routing": RoutingRule(
            router_selection_nonlinearity="none", expert_weighting_nonlinearity="sparsemixer", expert_weighting_normalization=False,
            router_jitter_noise=0.01,
        ),
    },
}  # fmt: skip
"""What families with rules of their own cannot be without."""


ONE_BY_ONE = [name for name, family in FAMILIES.items() if family.moe is not None and name not in ("gpt_oss", "dbrx", "llama4_text")]
"""Families whose experts are published one by one, or in another form than transformers keeps them."""


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_fused_experts_are_told_apart(family: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(contract_specs()["mixtral"], family=family, **OWN_RULES.get(family, {}))
    if family.startswith("deepseek") or family == "glm_moe_dsa":
        latent = wse.LatentAttention(kv_lora_rank=4, q_lora_rank=3, qk_nope_head_dim=6, v_head_dim=8)
        indexer = wse.Indexer(num_heads=2, head_dim=32, topk=4) if family in ("deepseek_v32", "glm_moe_dsa") else None
        spec = dataclasses.replace(spec, latent=latent, num_kv_heads=spec.num_heads, indexer=indexer)
    source = random_checkpoint(spec, seed=3)
    names = {t.name for role, t in published_names(spec).items() if ".experts." in role}
    fused = {f"model.layers.{n}.mlp.experts.gate_up_proj": np.zeros((3, 134, 20), dtype=np.float32) for n in range(2)}
    with pytest.raises(CheckpointError, match="experts are fused in this file: save it with transformers' original names"):
        open_checkpoint(write_checkpoint(source, tmp_path, replace={**dict.fromkeys(names), **fused}))


def test_rotary_frequencies_of_old_files_are_ignored(tied: Checkpoint, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, dtype=np.float32)}
    assert open_checkpoint(write_checkpoint(tied, tmp_path, replace=extra)).spec == tied.spec


def test_shape_against_config_is_named(mixtral: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape \(120, 20\), config\.json asks for \(160, 20\)"):
        open_checkpoint(write_checkpoint(mixtral, tmp_path, config={**mixtral.config, "num_attention_heads": 16}))


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_other_types_are_refused_by_name(tied: Checkpoint, tmp_path: Path, dtype: type) -> None:
    wrong = {"model.norm.weight": np.ones(20, dtype=dtype)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as (F64|I8); readable are float32, float16, bfloat16"):
        open_checkpoint(write_checkpoint(tied, tmp_path, replace=wrong))


def test_tied_head_may_be_there_but_has_the_right_shape(tied: Checkpoint, tmp_path: Path) -> None:
    embed = tied.tensors.read("model.embed_tokens.weight")
    assert open_checkpoint(write_checkpoint(tied, tmp_path / "a", replace={"lm_head.weight": embed})).spec.tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(130, 20\)"):
        open_checkpoint(write_checkpoint(tied, tmp_path / "b", replace={"lm_head.weight": embed[:-1]}))


def edit_index(directory: Path, **changes: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= {k.replace("__", "."): v for k, v in changes.items()}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b.safetensors", "C:x.safetensors", "a\0"]
)
def test_index_cannot_leave_the_directory(tied: Checkpoint, tmp_path: Path, name: str) -> None:
    write_checkpoint(tied, tmp_path / "model.safetensors-parent")  # a real file where "../" points to
    directory = write_checkpoint(tied, tmp_path / "inner", n_shards=2)
    edit_index(directory, model__norm__weight=name)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight': file .* is not a plain name of a file in this directory"):
        open_checkpoint(directory)


def test_index_names_other_formats_or_absent_files(tied: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tied, tmp_path, n_shards=2)
    edit_index(tmp_path, model__norm__weight="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'pytorch_model\.bin' is not a \.safetensors file; other formats are never opened"):
        open_checkpoint(tmp_path)
    edit_index(tmp_path, model__norm__weight="gone.safetensors")
    with pytest.raises(CheckpointError, match=r"files that it names are not there: gone\.safetensors"):
        open_checkpoint(tmp_path)


def test_index_that_disagrees_with_its_files(tied: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tied, tmp_path, n_shards=2)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(f for f in index.values() if f != index["model.norm.weight"])
    edit_index(tmp_path, model__norm__weight=other)
    with pytest.raises(CheckpointError, match=r"not in the file that it names for them: model\.norm\.weight"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tied: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tied, tmp_path / "whole")
    write_checkpoint(tied, tmp_path, n_shards=2)
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"stands in both model-00001-of-00002\.safetensors and model-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"])
def test_malformed_index_is_refused(tied: Checkpoint, tmp_path: Path, text: str) -> None:
    write_checkpoint(tied, tmp_path, n_shards=2)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX.replace(".", r"\.")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["stories260K", "stories260K-moe8x2-trained"])
def test_real_checkpoint_opens(name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip("the real checkpoints are not beside this repository")
    with open_checkpoint(DATA / name) as checkpoint:
        assert checkpoint.spec.vocab_size == 512
        assert checkpoint.spec.eos_token_ids == (2,)
        assert checkpoint.tokenizer_path is not None
        assert np.isfinite(checkpoint.tensors.read("model.norm.weight")).all()
