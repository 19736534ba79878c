"""Directories of models that also see: the language model inside is the model, whatever prefix its tensors have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wse_emu as wse
from wse_emu.checkpoint import open_checkpoint, parse_config
from wse_emu.foundation.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PLAIN = {"llama4": GOLDEN / "llama4_text-float32", "gemma3": GOLDEN / "gemma3_text-float32"}
VISION = {"vision_model.class_embedding": np.ones(3, np.float32), "multi_modal_projector.linear_1.weight": np.ones((2, 2), np.float32)}


def released(name: str) -> str:
    """As released files name it."""
    return "language_model." + name


def own(name: str) -> str:
    """As transformers names its modules."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def wrapped(kind: str, directory: Path, rename: Any = released, more: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The golden checkpoint of the language model, in a model of that kind."""
    directory.mkdir(exist_ok=True)
    text = json.loads((PLAIN[kind] / "config.json").read_text())
    del text["architectures"]
    config = {"architectures": ["SomethingForConditionalGeneration"], "model_type": kind, "text_config": text, "vision_config": {}}
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(PLAIN[kind] / "model.safetensors")
    save_file({rename(name): array for name, array in tensors.items()} | VISION | (more or {}), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("rename", [released, own])
@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_the_language_model_inside_is_the_model(kind: str, rename: Any, tmp_path: Path) -> None:
    directory = wrapped(kind, tmp_path / "m", rename)
    logits = []
    for path in (PLAIN[kind], directory):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec == open_checkpoint(PLAIN[kind]).spec
        model = wse.from_pretrained(path, wafer=wse.Wafer(rows=4, cols=4), cache_dir=tmp_path / "cache")
        logits.append(model(np.arange(7)).logits)
    assert logits[0].tobytes() == logits[1].tobytes()


def test_what_it_sees_with_is_left_out_and_named(tmp_path: Path) -> None:
    with open_checkpoint(wrapped("llama4", tmp_path / "m")) as checkpoint:
        assert checkpoint.ignored == tuple(sorted(VISION))
        assert not set(VISION) & set(checkpoint.tensors.names())
        assert checkpoint.config["model_type"] == "llama4_text"


def test_it_is_saved_as_a_language_model(tmp_path: Path) -> None:
    model = wse.from_pretrained(wrapped("llama4", tmp_path / "m"), wafer=wse.Wafer(rows=2, cols=2), cache_dir=tmp_path / "cache")
    model.save(tmp_path / "saved")
    again = wse.from_pretrained(tmp_path / "saved", wafer=wse.Wafer(rows=2, cols=2), cache_dir=tmp_path / "cache")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama4_text"
    assert again([3, 1, 4]).logits.tobytes() == model([3, 1, 4]).logits.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, r"`text_config` must be an object with the fields of the language model, got None"),
        ({"text_config": [1]}, r"`text_config` must be an object"),
        ({"text_config": {"model_type": "llama"}}, r"`text_config`: `model_type` must be 'llama4_text', got 'llama'"),
        ({"text_config": {}}, r"`hidden_size`"),
    ],
)
def test_what_is_no_language_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(wrapped("llama4", tmp_path / "m", **changes))
    with pytest.raises(ConfigError, match=message):
        parse_config({"model_type": "llama4", **changes})


def test_two_names_for_one_tensor_and_strangers_are_refused(tmp_path: Path) -> None:
    twice = {"model.norm.weight": np.ones(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"are both the language model's 'model\.norm\.weight'"):
        open_checkpoint(wrapped("llama4", tmp_path / "m", more=twice))
    with pytest.raises(CheckpointError, match=r"does not promise: audio_tower\.weight"):
        open_checkpoint(wrapped("llama4", tmp_path / "n", more={"audio_tower.weight": np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"promises are missing: .*model\.layers"):
        open_checkpoint(wrapped("llama4", tmp_path / "o", rename=lambda name: "decoder." + name))
