"""The emulator against transformers, live, on checkpoints that transformers itself writes: uneven heads, odd widths, any top-k."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Largest error allowed, in standard deviations of the array compared."""
NEW_TOKENS = 12

BASE: dict[str, Any] = {
    "vocab_size": 101, "max_position_embeddings": 128, "num_hidden_layers": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXTRAL = {
    "uneven-heads": {
        "hidden_size": 42, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "intermediate_size": 37,
        "num_local_experts": 5, "num_experts_per_tok": 3, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    },
    "one-expert-chosen": {
        "hidden_size": 33, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 29,
        "num_local_experts": 4, "num_experts_per_tok": 1, "rope_theta": 500.0,
    },
    "all-experts-chosen": {
        "hidden_size": 24, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 4, "intermediate_size": 19,
        "num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True,
    },
    "many-experts": {
        "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 11,
        "num_local_experts": 17, "num_experts_per_tok": 4, "num_hidden_layers": 3,
    },
}  # fmt: skip
LLAMA = {
    "uneven-heads": {"hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 61},
    "tied": {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 23,
        "tie_word_embeddings": True, "rope_theta": 1e5,
    },
}  # fmt: skip
CASES = [("mixtral", name, seed) for name in MIXTRAL for seed in (0, 1)] + [("llama", name, seed) for name in LLAMA for seed in (0, 1)]
GRIDS = [(4, 4), (7, 5), (3, 11)]


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes the golden files; its `consult` is the oracle here too."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("make_golden")


def written_by_transformers(directory: Path, family: str, shape: dict[str, Any], seed: int, dtype: str) -> None:
    """Let transformers make and save a model whose attention and routing are far from uniform."""
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.get("rope_theta", 10000.0)}}
    config_class, model_class = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    config = config_class(**BASE | {k: v for k, v in shape.items() if k != "rope_theta"} | theta)
    model = model_class(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape))).float()
            if p.ndim == 1:
                p.copy_(1 + 0.3 * noise)
            elif "embed" in name:
                p.copy_(0.5 * noise)
            else:
                gain = 2.0 if name.endswith("gate.weight") else 1.5
                p.copy_(gain * noise / p.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def assert_close(actual: NDArray[Any], expected: Any, what: str) -> None:
    expected = expected.double().numpy()
    assert actual.shape == expected.shape, what
    error, spread = np.abs(actual - expected).max(), expected.std()
    assert error <= TOLERANCE * spread, f"{what}: largest error {error:.2e}, standard deviation {spread:.2e}"


def consult_fairly(golden: ModuleType, model: Any, lengths: tuple[int, ...], seed: int) -> tuple[Any, Any, Any]:
    """Ids, mask and the oracle's answer for prompts of these lengths, padded on the left, where nothing is chosen by a hair."""
    mask = torch.zeros((len(lengths), max(lengths)), dtype=torch.int64)
    for row, n in zip(mask, lengths, strict=True):
        row[len(row) - n :] = 1
    rng = np.random.default_rng(100 + seed)
    for _ in range(1000):
        ids = torch.from_numpy(rng.integers(0, BASE["vocab_size"], tuple(mask.shape))) * mask
        oracle = golden.consult(model, ids, mask, new_tokens=NEW_TOKENS)
        try:
            golden.check_margins(model, oracle, mask)
        except golden.TooCloseError:
            continue
        return ids, mask, oracle
    raise AssertionError("no prompt leaves the margins: the model's routing is degenerate")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "name", "seed"), CASES)
def test_forward_and_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, golden: ModuleType, family: str, name: str, seed: int, dtype: str
) -> None:
    shape = (MIXTRAL if family == "mixtral" else LLAMA)[name]
    written_by_transformers(tmp_path, family, shape, seed, dtype)
    oracle_model = golden.load(tmp_path)
    rows, cols = GRIDS[(seed + len(name)) % len(GRIDS)]
    model = wse.from_pretrained(tmp_path, wafer=wse.Wafer(wse.WSE3, rows=rows, cols=cols))
    for lengths in ((1,), (13,), (5, 18, 11)):
        ids, mask, oracle = consult_fairly(golden, oracle_model, lengths, seed)
        real, what = mask.bool(), f"lengths {lengths}"
        here = real.numpy()
        out = model(ids.numpy(), attention_mask=mask.numpy(), output_hidden_states=True, output_router_logits=family == "mixtral")
        if family == "mixtral":
            for layer, router in enumerate(oracle.router_logits):
                assert_close(out.router_logits[layer][here], router[real], f"{what}: router logits of layer {layer}")
                np.testing.assert_array_equal(
                    out.topk_ids[layer][here], oracle.topk_ids[layer][real].numpy(), err_msg=f"{what}: layer {layer}"
                )
                weights = np.abs(out.topk_weights[layer][here] - oracle.topk_weights[layer][real].numpy())
                assert weights.max() <= TOLERANCE, f"{what}: weights of layer {layer}"
        for i, hidden in enumerate(oracle.hidden):
            assert_close(out.hidden_states[i][here], hidden[real], f"{what}: hidden state {i}")
        assert_close(out.logits[here], oracle.logits[real], f"{what}: logits")
        actual = model.generate(ids.numpy(), max_new_tokens=NEW_TOKENS, attention_mask=mask.numpy())
        np.testing.assert_array_equal(actual, oracle.generated.numpy(), err_msg=what)


def test_a_grid_of_one_core_is_enough(tmp_path: Path, golden: ModuleType) -> None:
    written_by_transformers(tmp_path, "mixtral", MIXTRAL["uneven-heads"], 3, "float32")
    ids, _, oracle = consult_fairly(golden, golden.load(tmp_path), (13,), 3)
    one = wse.Wafer(dataclasses.replace(wse.WSE3, sram_bytes_per_core=1 << 24), rows=1, cols=1)
    model = wse.from_pretrained(tmp_path, wafer=one)
    assert_close(model(ids.numpy()).logits, oracle.logits, "logits")
    np.testing.assert_array_equal(model.generate(ids.numpy(), max_new_tokens=NEW_TOKENS), oracle.generated.numpy())
