"""FP8 and MXFP4 against transformers: the numbers of every matrix bit for bit, the logits and the greedy tokens of models made of them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint

from ..checkpoint import fp8_files, test_mxfp4
from ..machine.models import EVERY_FAMILY

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4
"""Largest error of logits, in their standard deviations."""
NEW_TOKENS = 8
BLOCK = (4, 4)
EVEN: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
LATENT: dict[str, Any] = {
    **EVEN, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_rope_head_dim": 8, "index_head_dim": 8,
}  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("qwen3", "qwen3_moe", "minimax_m2", "glm4_moe"), EVEN),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa"), LATENT),
}
"""Families that are published in FP8, and sizes that blocks divide."""
MORE = {"index_n_heads": 9}
"""So that few keys have a score of exactly zero: of equal scores either side may take any."""
SAYS = {
    "quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}  # fmt: skip


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that made the golden files' answers."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    return importlib.import_module("golden_oracle")


def config_of(family: str, block: tuple[int, int], changes: dict[str, Any]) -> dict[str, Any]:
    config = {**EVERY_FAMILY[family], "bos_token_id": None, "pad_token_id": None, **MORE, **changes}
    known = {name: value for name, value in config.items() if name in EVERY_FAMILY[family] or name.endswith("_token_id")}
    return known | {"quantization_config": {**SAYS, "weight_block_size": list(block)}}


def assert_same_model(directory: Path, peer: Any, oracle: ModuleType, tmp_path: Path) -> None:
    """Logits, chosen experts and greedy tokens are those of transformers' model, where nothing is chosen by a hair."""
    ours = wse.from_pretrained(directory, wafer=wse.Wafer(wse.WSE3, rows=3, cols=4), cache_dir=tmp_path / "cache")
    ids, theirs = fair_answer(oracle, peer, ours.spec.vocab_size)
    out, expected = ours(ids, output_router_logits=ours.spec.is_moe), theirs.logits.numpy()
    assert np.abs(out.logits - expected).max() <= TOLERANCE * expected.std()
    for layer, chosen in enumerate(out.topk_ids or ()):
        np.testing.assert_array_equal(chosen, theirs.topk_ids[layer].numpy(), err_msg=f"router {layer}")
    np.testing.assert_array_equal(ours.generate(ids, max_new_tokens=NEW_TOKENS), theirs.generated.numpy())


def fair_answer(oracle: ModuleType, peer: Any, vocab_size: int) -> tuple[Any, Any]:
    rng, mask = np.random.default_rng(7), torch.ones(1, 13, dtype=torch.int64)
    for _ in range(500):
        ids = rng.integers(3, vocab_size, (1, 13))
        answer = oracle.consult(peer, torch.from_numpy(ids), mask, new_tokens=NEW_TOKENS)
        try:
            answer.check_margins()
        except oracle.TooCloseError:
            continue
        return ids, answer
    raise AssertionError("no prompt leaves the margins: the model's routing is degenerate")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_fp8_is_that_of_transformers(family: str, oracle: ModuleType, tmp_path: Path) -> None:
    """Where blocks divide every matrix, transformers' own dequantisation."""
    config = config_of(family, BLOCK, FAMILIES[family])
    directory = fp8_files.write(tmp_path / "m", fp8_files.twins(config, block=BLOCK)[0], config)
    assert_same_model(directory, oracle.load(directory), oracle, tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "minimax_m2", "deepseek_v3"])
def test_transformers_own_loader_reads_the_same_model(family: str, oracle: ModuleType, tmp_path: Path) -> None:
    """The directory as it is, through `from_pretrained`, which makes FP8 plain where there is no accelerator."""
    pytest.importorskip("accelerate")
    config = config_of(family, BLOCK, FAMILIES[family])
    directory = fp8_files.write(tmp_path / "m", fp8_files.twins(config, block=BLOCK)[0], config)
    experts = {} if family == "qwen3" else {"experts_implementation": "eager"}
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **experts
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(directory, peer.eval(), oracle, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_partial_blocks_are_those_of_transformers_products(family: str, oracle: ModuleType, tmp_path: Path) -> None:
    """Blocks keep their size at the edges, as where transformers goes back through its products; the model is that of these numbers."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight as dequantize

    config = config_of(family, (8, 6), {})
    stored, _ = fp8_files.twins(config)
    directory, plain, partial = fp8_files.write(tmp_path / "m", stored, config), {}, 0
    with open_checkpoint(directory) as opened:
        for name in opened.tensors.names():
            plain[name] = opened.tensors.read(name)
            if name + "_scale_inv" not in stored:
                continue
            codes = torch.from_numpy(stored[name].view(np.uint8)).view(torch.float8_e4m3fn)
            theirs = dequantize(codes, torch.from_numpy(stored[name + "_scale_inv"]), [8, 6], torch.float32)
            np.testing.assert_array_equal(plain[name], theirs.numpy(), err_msg=name)
            partial += bool(codes.shape[-2] % 8 and codes.shape[-1] % 6)
    assert partial > 2
    written = fp8_files.write(tmp_path / "plain", plain, {k: v for k, v in config.items() if k != "quantization_config"})
    assert_same_model(directory, oracle.load(written), oracle, tmp_path)


def test_a_model_in_mxfp4_is_that_of_transformers(oracle: ModuleType, tmp_path: Path) -> None:
    """By transformers' conversion, every number of the experts and what the model makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    directory = test_mxfp4.write(tmp_path / "m")
    packed = test_mxfp4.packed()
    with open_checkpoint(directory) as opened:
        for name in (test_mxfp4.UP, test_mxfp4.DOWN):
            theirs = convert_moe_packed_tensors(*(torch.from_numpy(packed[name + part].copy()) for part in ("_blocks", "_scales")))
            np.testing.assert_array_equal(opened.tensors.read(name), theirs.float().numpy(), err_msg=name)
    assert_same_model(directory, oracle.load(directory), oracle, tmp_path)


def test_transformers_own_loader_reads_the_same_mxfp4(oracle: ModuleType, tmp_path: Path) -> None:
    """The directory as it is, through `from_pretrained`."""
    pytest.importorskip("accelerate")
    directory = test_mxfp4.write(tmp_path / "m")
    says = json.loads((directory / "config.json").read_text())
    assert says["quantization_config"] == {"quant_method": "mxfp4"}
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert_same_model(directory, peer.eval(), oracle, tmp_path)
