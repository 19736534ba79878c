"""Real trained checkpoints that lie beside the repository (``../shared/data``); skipped where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

import wse_emu as wse

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="no real checkpoints beside the repository")]


@pytest.fixture(scope="module")
def stories() -> wse.WaferModel:
    return wse.from_pretrained(DATA / "stories260K", wafer=wse.Wafer(wse.WSE3, rows=8, cols=8))


@pytest.fixture(scope="module")
def mixture() -> wse.WaferModel:
    return wse.from_pretrained(DATA / "stories260K-moe8x2-trained", wafer=wse.Wafer(wse.WSE3, rows=16, cols=16))


def shakespeare(n_tokens: int) -> NDArray[np.int64]:
    """The last tokens of the text, (n_tokens,)."""
    text = (DATA / "corpora" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(DATA / "stories260K-moe8x2-trained" / "tokenizer.json"))
    return np.array(tokenizer.encode(text[-8 * n_tokens :]).ids[-n_tokens:], np.int64)


def loss(model: wse.WaferModel, ids: NDArray[np.int64]) -> float:
    logits = model(ids[None]).logits[0, :-1].astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(shifted)), ids[1:]]).mean())


def test_stories_tell_the_story_that_transformers_tells(stories: wse.WaferModel) -> None:
    golden = json.loads((DATA / "stories260K" / "golden_greedy.json").read_text(encoding="utf-8"))
    ids = np.asarray(stories.generate(np.array([golden["ids"][:1]]), max_new_tokens=len(golden["ids"]) - 1))[0].tolist()
    assert ids == golden["ids"]
    text = Tokenizer.from_file(str(DATA / "stories260K" / "tokenizer.json")).decode(ids)
    assert text.strip() == golden["text"].strip()


def test_stories_agree_with_the_reference_stage_by_stage(stories: wse.WaferModel) -> None:
    golden = json.loads((DATA / "stories260K" / "golden_greedy.json").read_text(encoding="utf-8"))
    report = stories.verify(np.array([golden["ids"][:64]]))
    assert report.passed, str(report)


def test_mixture_agrees_with_the_reference_stage_by_stage(mixture: wse.WaferModel) -> None:
    report = mixture.verify(shakespeare(128)[None])
    assert report.passed, str(report)


def test_mixture_predicts_shakespeare(mixture: wse.WaferModel) -> None:
    # Measured with transformers in float32. A logit's error of 1e-4 standard deviations (about 3) moves the loss by 6e-4 at most.
    assert loss(mixture, shakespeare(256)) == pytest.approx(2.740484, rel=0, abs=6e-4)
