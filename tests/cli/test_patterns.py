"""Options that say which keys queries attend to: the patterns they make, what they refuse, and that the commands run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import random_checkpoint
from wse_emu.cli.app import invoke
from wse_emu.cli.patterns import PatternOptions, layers_text
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.memoryx import build

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SPEC = random_checkpoint(CONFIG, 0).spec
OWN = AttentionPattern(window=5)
W = AttentionPattern(window=4, sinks=1)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model, whose second layer has a window of its own."""
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: tmp_path / "cache")
    return wse.from_config(CONFIG, seed=7).save(tmp_path / "model")


def asked(**words: Any) -> PatternOptions:
    return PatternOptions(**words)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (asked(window=4, sinks=1), (W, W, W)),
        (asked(window=4, sinks=1, dense_layers="0,2"), (FULL, W, FULL)),
        (asked(window=4, sinks=1, dense_layers="0-1"), (FULL, FULL, W)),
        (asked(window=4, sinks=1, sparse_layers="2"), (FULL, OWN, W)),
        (asked(window=4, sinks=1, sparse_layers=""), (FULL, OWN, FULL)),
        (asked(attention_chunk_size=8), (AttentionPattern(chunk=8),) * 3),
        (asked(window=4, columns="6:2"), (AttentionPattern(window=4, column_spacing=6, column_width=2),) * 3),
        (asked(fixed="8:2"), (AttentionPattern.fixed(local_attn_ctx=8, vert_size=2),) * 3),
        (asked(fixed="8:2:4"), (AttentionPattern.fixed_per_head(num_heads=4, num_verts=4, local_attn_ctx=8, vert_size=2),) * 3),
        (asked(attention='{"window": 4, "sinks": 1}', sparse_layers="1"), (FULL, W, FULL)),
        (asked(attention='[{"window": 4, "sinks": 1}, null, {}]'), (W, OWN, FULL)),
        (asked(attention='[{"window": 4, "sinks": 1}, null, {"chunk": 3}]', dense_layers="2"), (W, OWN, FULL)),
    ],
)
def test_options_make_patterns(options: PatternOptions, patterns: tuple[AttentionPattern, ...]) -> None:
    assert options.applied(SPEC).patterns == patterns
    assert options.applied(SPEC) == SPEC.with_attention(patterns)


def test_no_option_leaves_the_model_as_it_is() -> None:
    assert PatternOptions().applied(SPEC) is SPEC
    assert PatternOptions().words == []
    assert asked(window=4, sinks=1, fixed="8:2", sparse_layers="0-1").words == [
        "--window", "4", "--sinks", "1", "--fixed", "8:2", "--sparse-layers", "0-1",
    ]  # fmt: skip
    assert layers_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (asked(sinks=4), "--sinks adds keys to a local part: give --window or --attention-chunk-size"),
        (asked(columns="4:1"), "--columns adds keys to a local part"),
        (asked(window=4, attention_chunk_size=4), "--window and --attention-chunk-size are two local parts"),
        (asked(window=4, columns="4"), "--columns must be SPACING:WIDTH, positive integers, got '4'"),
        (asked(window=4, columns="4:5"), "`column_width` must be at most `column_spacing`"),
        (asked(window=4, columns="4:-1"), "--columns must be SPACING:WIDTH"),
        (asked(fixed="8"), r"--fixed must be CTX:VERT\[:NUM_VERTS\]"),
        (asked(fixed="8:3"), "`vert_size` must divide `local_attn_ctx`"),
        (asked(fixed="8:2:3"), r"`num_verts` must divide the number of heads \(4\), got 3"),
        (asked(fixed="8:2", window=4), "--fixed is a whole pattern; leave out --window, or leave --fixed out"),
        (asked(attention="{}", fixed="8:2", sinks=1), "--attention is a whole pattern; leave out --sinks, --fixed"),
        (asked(attention="{"), "--attention: not valid JSON"),
        (asked(attention='{"window": 4, "window": 5}'), "--attention: key 'window' stands there twice"),
        (asked(attention="7"), "--attention: must be an object with fields of a pattern"),
        (asked(attention='[{}, {"sink": 1}, {}]'), "--attention: layer 1: there is no field 'sink'; there are window"),
        (asked(attention="[{}]"), "--attention: must have one pattern for each of 3 layers, has 1"),
        (asked(attention="[{}, null, null, null]"), "has 4"),
        (asked(attention="[{}, {}, {}]", sparse_layers="1"), "--sparse-layers goes with one pattern"),
        (asked(attention="@/no/such/file"), "--attention @/no/such/file: cannot be read as text"),
        (asked(dense_layers="1"), "--dense-layers goes with a pattern"),
        (asked(sparse_layers="1"), "--sparse-layers goes with a pattern"),
        (asked(window=4, dense_layers="1", sparse_layers="0"), "--dense-layers and --sparse-layers both say"),
        (asked(window=4, dense_layers="first"), "--dense-layers must be layers between commas, as 0,5,8-11; got 'first'"),
        (asked(window=4, dense_layers="3"), r"--dense-layers must name layers in 0\.\.2, ascending, got '3'"),
        (asked(window=4, sparse_layers="2-1"), "ascending, got '2-1'"),
        (asked(window=4, sparse_layers="0-99"), "ascending, got '0-99'"),
        (asked(attention='{"heads": [{}, {}]}'), "layer 0: `heads` of its attention pattern must have one entry for each of 4 query heads"),
    ],
)
def test_contradictions_are_refused_by_rule(options: PatternOptions, message: str) -> None:
    with pytest.raises((wse.InputError, wse.SpecError), match=message):
        options.applied(SPEC)


def test_the_commands_run_and_verify_patterns(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [(7 * i + 3) % 40 for i in range(20)]
    (tmp_path / "ids").write_text(json.dumps(ids))
    (tmp_path / "pattern").write_text(json.dumps([{"window": 4, "sinks": 1}, None, {"mask": np.tri(32, dtype=int).tolist()}]))
    words = ["--ids", str(tmp_path / "ids"), "--rows", "3", "--cols", "2", "--attention", f"@{tmp_path / 'pattern'}"]
    assert invoke(["run", str(checkpoint), *words, "--max-new-tokens", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verification"]["passed"]
    assert document["model"]["spec"]["patterns"][:2] == [{"window": 4, "sinks": 1}, {"window": 5}]
    attention = [W, OWN, AttentionPattern(mask=np.tri(32, dtype=np.bool_))]
    with_patterns = wse.from_config(CONFIG, seed=7, wafer=wse.Wafer(wse.WSE3, rows=3, cols=2), attention=attention)
    assert document["generated"]["ids"] == with_patterns.generate(ids, max_new_tokens=3)[20:].tolist()
    plain = with_patterns.with_attention([SPEC.pattern(layer) for layer in range(3)])
    assert plain.generate(ids, max_new_tokens=3)[20:].tolist() != document["generated"]["ids"], "patterns make a difference"
    assert invoke(["verify", str(checkpoint), *words]) == 0
    out = capsys.readouterr().out
    assert "\nattention window 4, sinks 1: layers 0\nattention window 5: layers 1\n" in out
    assert invoke(["verify", str(checkpoint), *words, "--window", "3"]) == 2
    assert "--attention is a whole pattern" in capsys.readouterr().err


def test_plan_stops_at_the_positions_that_a_mask_describes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(checkpoint), "--rows", "2", "--prompt-tokens", "8", "--new-tokens", "2", "--json"]
    words += ["--attention", json.dumps({"mask": np.tri(12, dtype=int).tolist()}), "--sparse-layers", "0"]
    assert invoke(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["max_context"] == 12
    assert document["sparse_layers"] == "0"
