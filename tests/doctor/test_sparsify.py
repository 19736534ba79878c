"""Sensitivity of layers: the order of steps, the proposal, the loss, and the command."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.cli.app import invoke
from wse_emu.doctor.sparsify import SparsifyReport, check_sparsify, next_token_loss, rank_layers, sparsify
from wse_emu.doctor.sparsify_plot import plot
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.memoryx import build

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "command-line.md"
PATTERN = AttentionPattern(window=2, sinks=1)
HARM = (0.3, 0.1, 0.7, 0.1)


def ranked(layers: tuple[int, ...] = (0, 1, 2, 3), keep_dense: int = 1, asked: list[tuple[int, ...]] | None = None) -> SparsifyReport:
    def measure(sparse: tuple[int, ...]) -> tuple[float, int]:
        if asked is not None:
            asked.append(sparse)
        return 2.0 + sum(HARM[layer] for layer in sparse), 100_000_000 - 20_000_000 * len(sparse)

    return rank_layers(4, layers, keep_dense, measure, attention=PATTERN, n_tokens=40)


def test_the_least_sensitive_layers_become_sparse_first() -> None:
    asked: list[tuple[int, ...]] = []
    report = ranked(asked=asked)
    assert [step.added for step in report.steps] == [None, 1, 3, 0, 2]
    assert [step.sparse_layers for step in report.steps] == [(), (1,), (1, 3), (0, 1, 3), (0, 1, 2, 3)]
    np.testing.assert_allclose([step.loss for step in report.steps], [2, 2.1, 2.2, 2.5, 3.2])
    assert [step.kv_bytes for step in report.steps] == [100_000_000 - 20_000_000 * n for n in range(5)]
    np.testing.assert_allclose(report.sensitivity, HARM)
    assert report.dense_layers == (2,)
    assert report.proposed is report.steps[3]
    assert len(asked) == len(set(asked)), "nothing is measured twice"
    assert "3      0" in str(report)
    assert str(report).count("<- proposed") == 1
    assert ranked(keep_dense=0).dense_layers == ()
    assert ranked(keep_dense=4).proposed.sparse_layers == ()


def test_layers_that_lose_nothing_stay_as_they_are() -> None:
    asked: list[tuple[int, ...]] = []
    report = ranked((1, 2), asked=asked)
    assert set().union(*asked) == {1, 2}
    assert report.sensitivity[0] is report.sensitivity[3] is None
    assert report.untried_layers == (0, 3)
    assert [step.sparse_layers for step in report.steps] == [(), (1,), (1, 2)]
    assert report.proposed.sparse_layers == (1,)
    assert "stay as they are, for they have patterns of their own that are as narrow: 0, 3" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["untried_layers"] == [0, 3]


def test_the_picture_has_both_axes_with_their_scales() -> None:
    picture = plot(ranked())
    assert picture.count("<rect") == 5
    assert "3 sparse layers: loss 2.50000, 40,000,000 bytes" in picture
    texts = re.findall(r'text-anchor="(\w+)"[^>]*>([^<]*)</text>', picture)
    assert [text for anchor, text in texts if anchor == "end"] == ["2.0", "2.5", "3.0", "3.5"]
    assert [text for anchor, text in texts if anchor == "start"][1:] == ["0", "20", "40", "60", "80", "100"]
    assert [text for anchor, text in texts if anchor == "middle"] == [
        "0", "1", "2", "3", "4", "sparse layers, the least sensitive first", "loss, nats a token (line)", "keys and values, MB (columns)",
    ]  # fmt: skip
    flat = rank_layers(2, (0, 1), 1, lambda sparse: (2.0, 0), attention=PATTERN, n_tokens=9)
    assert "nan" not in plot(flat)


def test_the_loss_is_the_mean_of_the_tokens_after_the_first() -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((5, 7)).astype(np.float32), rng.integers(0, 7, 5)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert next_token_loss(logits, ids) == pytest.approx(-np.mean([np.log(p[t, ids[t + 1]]) for t in range(4)]))
    with pytest.raises(wse.InputError, match="a loss needs two tokens of text, got 1"):
        next_token_loss(logits[:1], ids[:1])


def test_layers_that_would_lose_keys() -> None:
    spec = wse.ModelSpec(
        family="qwen3", vocab_size=40, hidden_size=16, intermediate_size=8, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=4,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64, sliding_window=8, sliding_layers=(1,), chunk_size=8,
        chunked_layers=(2,),
    )  # fmt: skip
    window = AttentionPattern(window=3, sinks=1)
    assert check_sparsify(spec, window, 40, 1) == (0, 1, 2, 3)
    assert check_sparsify(spec, AttentionPattern(window=8), 40, 1) == (0, 3), "as wide as their own"
    assert check_sparsify(spec, AttentionPattern(window=4), 41, 1) == (0, 1, 3), "the last chunk holds one key then"
    assert check_sparsify(spec, AttentionPattern(mask=lambda q, k: k <= q - q % 2), 40, 0) == (0, 3)
    assert check_sparsify(spec, AttentionPattern(heads=(window, AttentionPattern())), 40, 0) == (0, 3), "one head in two"
    for pattern, n_tokens, why in (
        (AttentionPattern(window=39), 39, "is no narrower than the patterns that the layers have"),
        (AttentionPattern(), 40, "all keys is no narrower"),
        (window, 3, "is no narrower"),
    ):
        with pytest.raises(wse.InputError, match=f"no layer would lose a key: .*{why}.* give a longer text, or a narrower pattern"):
            check_sparsify(spec, pattern, n_tokens, 1)
    dense = replace(spec, sliding_window=None, sliding_layers=(), chunk_size=None, chunked_layers=())
    with pytest.raises(wse.InputError, match=r"window 3, sinks 1 admits every key \(4 tokens of text\); give a longer text"):
        check_sparsify(dense, window, 4, 1)
    with pytest.raises(wse.InputError, match=r"`keep_dense` must be an integer in 0\.\.2 .* got 3"):
        check_sparsify(spec, AttentionPattern(window=8), 40, 3)
    with pytest.raises(wse.InputError, match="a loss needs two tokens of text, got 1"):
        check_sparsify(spec, window, 1, 1)


def test_steps_are_those_of_models_with_such_patterns() -> None:
    """gpt-oss: its first layer has a window of 11 of its own, the second sees every key."""
    ids = np.arange(30) * 7 % 40
    wafer = wse.Wafer(wse.WSE3, rows=2, cols=2)
    model = wse.from_pretrained(GOLDEN / "gpt_oss-float32", wafer=wafer)
    report = sparsify(model, ids, PATTERN, keep_dense=1)
    assert sorted(step.added for step in report.steps[1:] if step.added is not None) == [0, 1]
    for step in report.steps:
        attention = [PATTERN if layer in step.sparse_layers else model.spec.pattern(layer) for layer in range(2)]
        alone = wse.from_pretrained(GOLDEN / "gpt_oss-float32", wafer=wafer, attention=attention)
        assert step.loss == next_token_loss(alone(ids).logits[0], ids)
        assert alone.recorded_kv is not None
        numbers = 2 * model.spec.num_kv_heads * model.spec.head_dim
        assert step.kv_bytes == 4 * numbers * alone.recorded_kv.sum()
    assert model.spec.patterns == ()
    report = sparsify(model, ids, AttentionPattern(window=11), keep_dense=0)
    assert report.untried_layers == (0,)
    assert [step.sparse_layers for step in report.steps] == [(), (1,)]
    with pytest.raises(wse.InputError, match=r"the integers of one text, \(tokens,\), got int64 of shape \(1, 30\)"):
        sparsify(model, ids[None], PATTERN)


def test_the_command_measures_and_says_how_to_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path / "cache")
    (tmp_path / "ids").write_text(" ".join(str(i * 7 % 40) for i in range(30)))
    words = ["sparsify", str(GOLDEN / "gpt_oss-float32"), "--ids", str(tmp_path / "ids"), "--rows", "2"]
    assert invoke([*words, "--window", "11", "--plot", str(tmp_path / "steps.svg")]) == 0
    out = capsys.readouterr().out
    assert "keep dense: 1\nstay as they are, for they have patterns of their own that are as narrow: 0\n" in out
    assert "the proposal is the model as it is" in out
    assert (tmp_path / "steps.svg").read_text().startswith("<svg")
    assert invoke([*words, "--window", "99", "--sinks", "1"]) == 2
    assert "no layer would lose a key: window 99, sinks 1 is no narrower" in capsys.readouterr().err
    assert invoke([*words, "--keep-dense", "0"]) == 0
    out = capsys.readouterr().out
    assert "sparse: window 3, sinks 3; 30 tokens" in out
    said = out.partition("to verify it: wse-emu ")[2].split()
    assert said[-6:] == ["--window", "3", "--sinks", "3", "--sparse-layers", "0-1"]
    assert invoke([*said, "--ids", str(tmp_path / "ids"), "--rows", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["spec"]["patterns"] == [{"window": 3, "sinks": 3}] * 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--plot", "/no/such/x.svg"], 4, "--plot /no/such/x.svg: cannot be written (there is no directory /no/such)"),
        (["--window", "255"], 2, "no layer would lose a key: window 255 admits every key (255 tokens of text); give a longer text"),
        (["--prompt", "hello", "--window", "9"], 2, "no layer would lose a key: window 9 admits every key"),
        (["--attention", "[{}, {}, {}, {}]"], 2, "--attention: sparsify tries one pattern in every layer"),
        (["--sinks", "2"], 2, "--sinks adds keys to a local part"),
        (["--keep-dense", "5"], 2, "`keep_dense` must be an integer in 0..4"),
        (["--text", "/no/such/file"], 2, "--text /no/such/file: cannot be read as text"),
        (["--text", "/no/such/file", "--prompt", "x"], 2, "`--prompt` and `--text` both say where to start"),
    ],
)
def test_what_measures_nothing_is_refused_before_weights_are_read(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wse_emu.cli.sparsify.load", None)
    assert invoke(["sparsify", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"wse-emu: {message}")


def test_a_plot_where_nothing_may_be_written_is_refused_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wse_emu.cli.sparsify.load", None)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert invoke(["sparsify", "--plot", str(tmp_path / "x.svg")]) == 4
    assert capsys.readouterr().err == f"wse-emu: --plot {tmp_path / 'x.svg'}: cannot be written (Permission denied)\n"


@pytest.mark.slow
def test_the_command_alone_measures_the_shipped_model_as_the_page_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["sparsify", "--keep-dense", "2"]) == 0
    out = capsys.readouterr().out
    assert "sparse: window 31, sinks 4; 255 tokens\n" in out
    (said,) = re.findall(r"^```text\n(sparse layers.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert out.endswith(said)
    (tmp_path / "text").write_text("Return the object that was given. " * 8)
    words = ["sparsify", "--text", str(tmp_path / "text"), "--rows", "6", "--keep-dense", "1", "--attention-chunk-size", "9", "--json"]
    assert invoke(words) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["sparsify"]
    assert found["attention"] == {"chunk": 9}
    assert document["options"][:3] == ["--attention-chunk-size", "9", "--sparse-layers"]
    assert all(rise != 0 for rise in found["sensitivity"])
    sizes = [step["kv_bytes"] for step in found["steps"]]
    assert all(a > b for a, b in pairwise(sizes))
