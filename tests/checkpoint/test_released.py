"""config.json as models are released: read without a word, by `model_type`; fields that transformers does not look at are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import Checkpoint, open_checkpoint, parse_config, random_checkpoint, read_config, unread_fields
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.cli.app import invoke
from wse_emu.foundation.errors import CheckpointError, ConfigError

from ..machine.models import EVERY_FAMILY
from .fp8_files import write
from .released import RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_describes_its_model(name: str, tmp_path: Path) -> None:
    config, billions = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, spec = read_config(tmp_path)
    assert spec.n_params / 1e9 == pytest.approx(billions, rel=0.006)
    assert unread_fields(read) == ()


def test_there_is_one_of_every_family() -> None:
    assert {parse_config(config).family for config, _ in RELEASED.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_type_decides_whatever_the_architecture_is_called(family: str) -> None:
    config, spec = EVERY_FAMILY[family], parse_config(EVERY_FAMILY[family])
    for names in (["TheirOwnForCausalLM"], ["SomeModel", FAMILIES[family].architecture], None):
        assert parse_config({**config, "architectures": names}) == spec
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForRewardModel", "ForEmbedding"):
        with pytest.raises(ConfigError, match=f"architecture 'X{head}' has another head than a language model's"):
            parse_config({**config, "architectures": [f"X{head}"]})
    other = "LlamaForCausalLM" if family != "llama" else "MistralForCausalLM"
    with pytest.raises(ConfigError, match=r"`model_type` must be '(llama|mistral)' for architecture"):
        parse_config({**config, "architectures": [other]})


@pytest.mark.parametrize(("family", "field", "said", "meant"), [
    ("deepseek_v3", "scoring_func", "softmax", "sigmoid"), ("deepseek_v3", "topk_method", "greedy", "noaux_tc"),
    ("deepseek_v32", "scoring_func", "softmax", "sigmoid"), ("glm_moe_dsa", "indexer_rope_interleave", False, True),
    ("glm_moe_dsa", "moe_layer_freq", 2, 1), ("glm4_moe", "scoring_func", "softmax", "sigmoid"),
    ("dots1", "scoring_func", "softmax", "sigmoid"), ("deepseek_v2", "scoring_func", "sigmoid", "softmax"),
    ("deepseek_v2", "norm_topk_prob", True, False), ("minimax_m2", "use_routing_bias", False, True),
    ("hunyuan_v1_moe", "use_cla", True, False), ("hunyuan_v1_moe", "num_shared_expert", [2, 2], [1, 1]),
    ("ernie4_5_moe", "moe_use_aux_free", False, True),
])  # fmt: skip
def test_what_transformers_does_not_look_at_changes_nothing_and_is_named(
    family: str, field: str, said: Any, meant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EVERY_FAMILY[family]
    for value in (meant, None):
        assert unread_fields({**config, field: value}) == ()
    told = {**config, field: said}
    assert parse_config(told) == parse_config(config)
    named = f"`{field}` ({said!r}) of config.json"
    assert unread_fields(told) == (named,)
    (tmp_path / "config.json").write_text(json.dumps(told))
    words = ["plan", str(tmp_path / "config.json"), "--prompt-tokens", "4", "--rows", "2", "--cols", "2"]
    assert invoke(words) == 0
    assert capsys.readouterr().err == f"left out, as transformers does: {named}\n"
    assert invoke([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["ignored"], err) == ([named], "")


def test_another_head_dim_beside_rotary_ones_is_not_looked_at() -> None:
    """GLM-5 says 192, which is no size of it."""
    config = EVERY_FAMILY["glm_moe_dsa"]
    assert parse_config({**config, "head_dim": 192}) == parse_config(config)


def tensors_of(source: Checkpoint) -> dict[str, np.ndarray]:
    return {name: source.tensors.read(name) for name in source.tensors.names()}


@pytest.mark.parametrize(("family", "dense", "moe"), [
    ("deepseek_v3", 0, 1), ("qwen2_moe", 1, 0), ("qwen3_moe", 1, 0), ("ernie4_5_moe", 0, 1), ("llama4_text", 1, 0),
])  # fmt: skip
def test_experts_of_a_layer_that_is_dense_are_left_out_and_named(family: str, dense: int, moe: int, tmp_path: Path) -> None:
    """Experts, the shared ones and the router, whatever they are called and however they lie; all else is still refused."""
    config = EVERY_FAMILY[family]
    source = random_checkpoint(config, seed=1)
    plain = tensors_of(source)
    extra = {
        name.replace(f"layers.{moe}.", f"layers.{dense}."): values for name, values in plain.items()
        if f"layers.{moe}." in name and name.replace(f"layers.{moe}.", f"layers.{dense}.") not in plain
    }  # fmt: skip
    assert any("experts" in name for name in extra)
    assert any(".gate." in name or ".router." in name for name in extra)
    assert any("shared" in name for name in extra) or family == "qwen3_moe"
    with open_checkpoint(write(tmp_path / "m", plain | extra, config)) as opened:
        assert opened.ignored == tuple(sorted(extra))
    for wrong in (f"model.layers.{dense}.mlp.extra.weight", f"model.layers.{moe}.mlp.experts.99.gate_proj.weight"):
        with pytest.raises(CheckpointError, match=f"does not promise: {wrong}"):
            open_checkpoint(write(tmp_path / wrong, plain | {wrong: np.zeros((2, 2), np.float32)}, config))


def test_a_field_and_tensors_that_are_left_out_are_named_together(tmp_path: Path) -> None:
    config = {**EVERY_FAMILY["minimax_m2"], "use_routing_bias": False}
    plain = tensors_of(random_checkpoint(config, seed=1))
    stored = plain | {"model.mtp.0.norm.weight": np.ones(3, np.float32)}
    with open_checkpoint(write(tmp_path / "m", stored, config)) as opened:
        assert opened.ignored == ("`use_routing_bias` (False) of config.json", "model.mtp.0.norm.weight")
        assert opened.spec == parse_config(EVERY_FAMILY["minimax_m2"])
    assert wse.from_config(config, wafer=wse.Wafer(wse.WSE3, rows=1, cols=1, executor="dry")).checkpoint.ignored == ()
