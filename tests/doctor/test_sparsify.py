"""Sensitivity of layers: the order of steps, the proposal, the loss, and the command."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.cli.app import invoke
from wse_emu.doctor.sparsify import next_token_loss, plot, sparsify


def test_the_least_sensitive_layers_become_sparse_first() -> None:
    harm, asked = (0.3, 0.1, 0.7, 0.1), []

    def measure(sparse: tuple[int, ...]) -> tuple[float, int]:
        asked.append(sparse)
        return 2.0 + sum(harm[layer] for layer in sparse), 100 - 20 * len(sparse)

    report = sparsify(4, 1, measure)
    assert [step.added for step in report.steps] == [None, 1, 3, 0, 2]
    assert [step.sparse_layers for step in report.steps] == [(), (1,), (1, 3), (0, 1, 3), (0, 1, 2, 3)]
    np.testing.assert_allclose([step.loss for step in report.steps], [2, 2.1, 2.2, 2.5, 3.2])
    assert [step.kv_bytes for step in report.steps] == [100, 80, 60, 40, 20]
    np.testing.assert_allclose(report.sensitivity, harm)
    assert report.dense_layers == (2,)
    assert report.proposed is report.steps[3]
    assert len(asked) == len(set(asked)), "nothing is measured twice"
    assert "3      0" in str(report)
    assert str(report).count("<- proposed") == 1
    assert sparsify(4, 0, measure).dense_layers == ()
    assert sparsify(4, 4, measure).proposed.sparse_layers == ()
    picture = plot(report)
    assert picture.count("<rect") == 5
    assert "3 sparse layers: loss 2.50000, 40 bytes" in picture
    with pytest.raises(wse.InputError, match=r"`keep_dense` must be an integer in 0\.\.4 .* got 5"):
        sparsify(4, 5, measure)


def test_the_loss_is_the_mean_of_the_tokens_after_the_first() -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((5, 7)).astype(np.float32), rng.integers(0, 7, 5)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert next_token_loss(logits, ids) == pytest.approx(-np.mean([np.log(p[t, ids[t + 1]]) for t in range(4)]))
    with pytest.raises(wse.InputError, match="a loss needs two tokens of text, got 1"):
        next_token_loss(logits[:1], ids[:1])


@pytest.mark.slow
def test_the_command_measures_the_shipped_model(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "ids"
    text.write_text(" ".join(str(i) for i in np.random.default_rng(0).integers(0, 200, 40)))
    words = ["sparsify", "--ids", str(text), "--keep-dense", "1", "--window", "4", "--sinks", "1", "--rows", "8"]
    words += ["--plot", str(tmp_path / "steps.svg")]
    assert invoke([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sparsify"]
    n = len(found["sensitivity"])
    assert len(found["steps"]) == n + 1
    assert len(found["dense_layers"]) == 1
    assert max(range(n), key=lambda layer: found["sensitivity"][layer]) == found["dense_layers"][0]
    assert found["steps"][0]["loss"] == found["loss"]
    sizes = [step["kv_bytes"] for step in found["steps"]]
    assert all(a > b for a, b in pairwise(sizes))
    assert (tmp_path / "steps.svg").read_text().startswith("<svg")
    assert invoke(words) == 0
    assert "keep dense:" in capsys.readouterr().out
    assert found["steps"][-1]["loss"] != found["loss"]
    assert invoke([*words, "--keep-dense", "99"]) == 2
