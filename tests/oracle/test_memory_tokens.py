"""Memory tokens against transformers' Llama whose projections are ModelZoo's: both products of every token, and a mask that keeps one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wse_emu as wse

pytestmark = pytest.mark.oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHUNK, PER, VOCAB = 5, 2, 83
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "attention_bias": True, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MEMORY = {
    "attn_memory_chunk_size": CHUNK, "num_memory_tokens_per_chunk": PER, "add_qkv_memory_weights": True, "add_extra_embedding": True,
    "add_chunked_attn_mask": True, "memory_token_id": 0,
}  # fmt: skip


def projection(ordinary: Any, place: dict[str, Any]) -> Any:
    """A projection beside which lies that of memory tokens."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ordinary, self.memory = ordinary, torch.nn.Linear(ordinary.in_features, ordinary.out_features)
            torch.nn.init.normal_(self.memory.weight, std=0.3)
            torch.nn.init.normal_(self.memory.bias)

        def forward(self, x: Any) -> Any:
            mask = place["mask"].unsqueeze(-1)
            return self.memory(x) * mask + self.ordinary(x) * (~mask)

    return Both()


class Oracle:
    """The text with memory tokens between its chunks, through all of the model at once."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(3)
        config = transformers.LlamaConfig(**SHAPE, attn_implementation="eager", initializer_range=0.3)
        self.model = transformers.LlamaForCausalLM(config).eval().to(torch.float32)
        for name, values in self.model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(values)
        self.model.save_pretrained(directory)
        self.embedding, self.place = torch.randn(1, 24) * 0.3, {}
        stored = load_file(directory / "model.safetensors") | {"model.memory_token_embedding.weight": self.embedding.numpy()}
        for i, layer in enumerate(self.model.model.layers):
            for name, module in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
                both = projection(getattr(layer.self_attn, name + "_proj"), self.place)
                setattr(layer.self_attn, name + "_proj", both)
                prefix = f"model.layers.{i}.self_attn.proj_{module}_memory_tokens_layer."
                stored |= {prefix + kind: getattr(both.memory, kind).detach().numpy() for kind in ("weight", "bias")}
        save_file(stored, directory / "model.safetensors")
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**written, "memory_tokens": MEMORY}))

    def logits(self, text: np.ndarray) -> np.ndarray:
        """(tokens of the text, vocab)."""
        ids, memory = [], []
        for first in range(0, len(text), CHUNK):
            chunk = text[first : first + CHUNK].tolist()
            more = PER if first + CHUNK < len(text) else 0
            ids += chunk + [0] * more
            memory += [False] * len(chunk) + [True] * more
        n, size = len(ids), CHUNK + PER
        self.place["mask"] = torch.tensor(memory)[None]
        x = self.model.model.embed_tokens(torch.tensor(ids))
        x = torch.where(self.place["mask"][0, :, None], self.embedding, x)[None]
        # ModelZoo's chunks and vertical columns: these begin at the end of a spacing and are as wide as there are memory tokens.
        seen = torch.zeros(n, n, dtype=torch.bool)
        for q in range(n):
            for k in range(q + 1):
                seen[q, k] = k // size == q // size or (k >= size - 1 and (k - (size - 1)) % size < PER)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = self.model(inputs_embeds=x, attention_mask=mask, position_ids=torch.arange(n)[None]).logits
        found: np.ndarray = logits[0].numpy()[~np.array(memory)]
        return found


def test_logits_and_greedy_tokens_are_those_of_the_whole_sequence(tmp_path: Path) -> None:
    oracle = Oracle(tmp_path / "model")
    model = wse.from_pretrained(tmp_path / "model", wafer=wse.Wafer(wse.WSE3, rows=5, cols=4), cache_dir=tmp_path)
    for n in (1, 5, 6, 19):
        text = np.random.default_rng(n).integers(0, VOCAB, n)
        expected = oracle.logits(text)
        assert np.abs(model(text).logits[0] - expected).max() <= 1e-4 * expected.std()
        generated = model.generate(text, 12)
        for at in range(n, n + 12):
            assert generated[at] == oracle.logits(generated[:at])[-1].argmax()
