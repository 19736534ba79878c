"""Sizes that no machine has: refused or planned for in bounded time and memory, before anything of that size is allocated."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import wse_emu as wse
from wse_emu.cli.app import invoke
from wse_emu.cli.exits import Exit
from wse_emu.engine.plan import MAX_PROMPT_TOKENS, Workload, plan_model
from wse_emu.foundation.rope_scaling import MAX_CONTEXT, RopeScaling

from .bases import CONFIGS
from .watch import watched_opens

CONFIG: dict[str, Any] = {**CONFIGS["mixtral"], "max_position_embeddings": 1 << 31}


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 1 << 31}, {"intermediate_size": 1 << 31}, {"vocab_size": 1 << 31}, {"head_dim": 1 << 31},
        {"num_attention_heads": 1 << 31, "num_key_value_heads": 1 << 31}, {"num_hidden_layers": 1 << 16}, {"num_hidden_layers": 1 << 31},
        {"num_local_experts": 1 << 15, "num_experts_per_tok": 1 << 15}, {"num_local_experts": 1 << 15, "num_hidden_layers": 1 << 15},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e308}},
    ],
    ids=lambda sizes: " ".join(sizes),
)  # fmt: skip
def test_absurd_sizes_in_config_are_refused_before_anything_is_allocated(sizes: dict[str, Any], tmp_path: Path) -> None:
    """By the configuration itself, or because no tensor of that shape is there."""
    from wse_emu.checkpoint import random_checkpoint
    from wse_emu.testing import write_checkpoint

    write_checkpoint(random_checkpoint(CONFIGS["mixtral"], seed=3), tmp_path, config={**CONFIGS["mixtral"], **sizes})
    with watched_opens(tmp_path), pytest.raises((wse.ConfigError, wse.CheckpointError), match=r"config\.json"):
        wse.from_pretrained(tmp_path, wafer=wse.Wafer(rows=2, cols=2))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--prompt-tokens", "2000000000"], r"2000000000 tokens of prompts .*at most \d+ are planned for"),
        (["--batch", "1000000000"], r"\d+ tokens of prompts .*at most \d+ are planned for"),
        (["--batch", "9" * 400], "of prompts .*at most"),
        (["--new-tokens", "9" * 400], "positions"),
        (["--prompt-tokens", "2147483000", "--prefill-chunk", "1"], "2147483000 tokens of prompts"),
    ],
)
def test_a_plan_of_more_tokens_than_any_wafer_holds_is_refused_at_once(
    options: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with watched_opens(tmp_path):
        assert invoke(["plan", str(tmp_path), *options]) == Exit.USAGE
    said = capsys.readouterr().err
    assert len(said) < 600
    assert re.search(what, said), said


def test_prompts_at_the_limit_are_planned_for_and_beyond_it_refused() -> None:
    with pytest.raises(wse.InputError, match=f"{MAX_PROMPT_TOKENS + 1} tokens of prompts"):
        Workload.of((MAX_PROMPT_TOKENS, 1), 0, None)
    assert Workload.of((MAX_PROMPT_TOKENS,), 5, MAX_PROMPT_TOKENS // 4).capacity == (MAX_PROMPT_TOKENS + 5,)
    model = wse.from_config(CONFIG)
    with pytest.raises(wse.InputError, match="tokens of prompts"):
        plan_model(model.spec, prompt_tokens=MAX_PROMPT_TOKENS // 2, batch=3)
    with pytest.raises(wse.InputError, match="tokens of prompts"):
        wse.from_config(CONFIG, max_tokens=1 << 31)


def test_a_stretched_context_is_finite() -> None:
    """Its length is an integer: a factor near the end of float64 times the positions was infinity."""
    common: dict[str, Any] = {"kind": "linear", "original_max_position_embeddings": 1 << 31}
    assert RopeScaling(**common, factor=512.0).context_length == MAX_CONTEXT
    for factor in (512.5, 1e300, math.nextafter(math.inf, 0)):
        with pytest.raises(wse.SpecError, match=rf"must be at most {MAX_CONTEXT} positions, got"):
            RopeScaling(**common, factor=factor)
