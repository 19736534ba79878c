"""The trained model that ships with the package: complete, small, and through the emulator as good as transformers measured it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import wse_emu as wse

MODEL = Path(str(files("wse_emu") / "data" / "pydoc-moe-8x2"))
HELD_OUT = json.loads((MODEL / "heldout.json").read_text(encoding="utf-8"))
WINDOWS = (0, 5)
"""Held-out windows that run by default; all of them with ``-m slow``."""
LOGITS_ERROR = 1e-4
"""Largest error of a logit in standard deviations: the tolerance of tests/test_golden.py."""
TOLERANCE = 2 * LOGITS_ERROR * HELD_OUT["logits_std"] + 0.5e-6
"""A token's loss is logsumexp(logits) - logit: each term moves at most as far as the logits do. The recorded loss is rounded to 1e-6."""


def model_of(directory: Path) -> wse.WaferModel:
    return wse.from_pretrained(directory, wafer=wse.Wafer(wse.WSE3, rows=16, cols=16))


def losses(model: wse.WaferModel, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean loss of tokens 1.. of each window, (windows,), in nats."""
    result = []
    for window in ids:
        logits = model(window[None]).logits[0, :-1].astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(shifted).sum(axis=1))
        result.append((log_sum - shifted[np.arange(len(shifted)), window[1:]]).mean())
    return np.array(result)


def windows(which: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(HELD_OUT["ids"], np.int64)[list(which)]


@pytest.fixture(scope="module")
def model() -> wse.WaferModel:
    return model_of(MODEL)


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> wse.WaferModel:
    """The model with the rows of every router permuted, as it was when the recorded loss was measured."""
    directory = tmp_path_factory.mktemp("permuted")
    shutil.copy(MODEL / "config.json", directory)
    tensors: dict[str, NDArray[Any]] = load_file(MODEL / "model.safetensors")
    for name in tensors:
        assert tensors[name].dtype == ml_dtypes.bfloat16
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name] = np.ascontiguousarray(tensors[name][HELD_OUT["router_permutation"]])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model_of(directory)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 6_000_000


def test_it_is_a_mixture_in_bfloat16() -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 8, 2)
    with safe_open(MODEL / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}


def test_source_and_licence_of_the_text_are_stated() -> None:
    text = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "pydoc_data.topics" in text
    assert "PSF" in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE").read_text(encoding="utf-8")


def test_held_out_loss_is_the_recorded_one(model: wse.WaferModel) -> None:
    expected = np.array(HELD_OUT["loss_per_window"])[list(WINDOWS)]
    np.testing.assert_allclose(losses(model, windows(WINDOWS)), expected, rtol=0, atol=TOLERANCE)


def test_permuted_routers_hurt_as_recorded(permuted: wse.WaferModel) -> None:
    actual = losses(permuted, windows(WINDOWS))
    expected = np.array(HELD_OUT["loss_per_window_permuted_router"])[list(WINDOWS)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    assert (actual > np.array(HELD_OUT["loss_per_window"])[list(WINDOWS)] + 0.1).all()


@pytest.mark.slow
def test_loss_of_all_held_out_windows(model: wse.WaferModel, permuted: wse.WaferModel) -> None:
    everything = windows(tuple(range(len(HELD_OUT["ids"]))))
    assert losses(model, everything).mean() == pytest.approx(HELD_OUT["loss"], rel=0, abs=TOLERANCE)
    assert losses(permuted, everything).mean() == pytest.approx(HELD_OUT["loss_permuted_router"], rel=0, abs=TOLERANCE)


def test_every_expert_has_work(model: wse.WaferModel) -> None:
    out = model(windows(WINDOWS)[:1], output_router_logits=True)
    for layer, ids in enumerate(out.topk_ids):
        load = np.bincount(ids.ravel(), minlength=8) / ids.size
        assert load.min() > 0.02, f"layer {layer}: {load.round(3)}"
        assert load.max() < 0.4, f"layer {layer}: {load.round(3)}"


def test_greedy_text_is_the_recorded_one(model: wse.WaferModel) -> None:
    greedy = HELD_OUT["greedy"]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(greedy["prompt"]).ids
    assert prompt == greedy["prompt_ids"]
    assert greedy["smallest_lead"] > 2 * LOGITS_ERROR * HELD_OUT["logits_std"]  # so the tokens must be the same
    ids = model.generate(np.array([prompt]), max_new_tokens=len(greedy["ids"]) - len(prompt))
    assert np.asarray(ids)[0].tolist() == greedy["ids"]
    text = tokenizer.decode(greedy["ids"])
    assert text == greedy["text"]
    assert text.startswith(greedy["prompt"])
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = "def f(x):\n    return x**2  # ÄÖ 文字 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
