"""The language model inside a model that also sees, as transformers saves and runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EYE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14,
}  # fmt: skip
LLAMA4_EYE = EYE | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}


@pytest.mark.parametrize(("kind", "eye"), [("Llama4", LLAMA4_EYE), ("Gemma3", EYE)])
@pytest.mark.filterwarnings("ignore")
def test_text_alone_gives_the_logits_of_transformers(kind: str, eye: dict[str, Any], tmp_path: Path) -> None:
    text = json.loads((GOLDEN / f"{kind.lower()}_text-float32" / "config.json").read_text())
    del text["architectures"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=eye)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        # Llama 4's own call asks its language model for images.
        expected = (model.language_model if kind == "Llama4" else model)(input_ids=ids).logits[0].numpy()
    model.save_pretrained(tmp_path / "m")
    ours = wse.from_pretrained(tmp_path / "m", wafer=wse.Wafer(rows=4, cols=4), cache_dir=tmp_path / "cache")
    found = np.asarray(ours(ids[0].numpy()).logits).reshape(expected.shape)
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()
