"""Arguments of the wrong type or value: each a named error that names the argument, before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.cli.options import shipped_model

CONFIG = {
    "model_type": "mixtral", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_local_experts": 5,
    "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
JUNK: dict[str, Any] = {
    "None": None, "true": True, "numpy true": np.True_, "text": "x", "empty text": "", "long text": "x" * 100_000, "nul": "\0",
    "surrogate": "\ud800", "bytes": b"x", "zero": 0, "minus one": -1, "huge": 10**30,
    "beyond decimal": 10**5000, "below decimal": -(10**5000), "fraction": 3.5,
    "nan": float("nan"), "infinity": float("inf"), "complex": 1j, "list": [], "nested": [[]], "deep": DEEP, "ragged": [[1], [1, 2]],
    "dict": {}, "mixed keys": {1: 2, "a": 3}, "tuple": (1, 2), "set": {1}, "array": np.array([1]), "object array": np.array([None]),
    "object": object(), "type": int, "function of none": lambda: 0, "path": Path("y"), "kernel": np.sum,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> wse.WaferModel:
    return wse.from_config(CONFIG, seed=3, wafer=wse.Wafer(rows=2, cols=2))


@pytest.fixture(scope="module")
def dry() -> wse.WaferModel:
    return wse.from_config(CONFIG, seed=3, wafer=wse.Wafer(rows=2, cols=2, executor="dry"))


CALLS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "model(input_ids)": (lambda m, d, x: m(x), {"array", "tuple"}),
    "model(attention_mask)": (lambda m, d, x: m([1, 2], x), {"None"}),
    "model(output_hidden_states)": (lambda m, d, x: m([1, 2], output_hidden_states=x), {"true", "numpy true"}),
    "model(output_router_logits)": (lambda m, d, x: m([1, 2], output_router_logits=x), {"true", "numpy true"}),
    "model(routing)": (lambda m, d, x: m([1, 2], routing=x), {"None"}),
    "dry(routing)": (lambda m, d, x: d([1, 2], routing=x), {"None"}),
    "generate(input_ids)": (lambda m, d, x: m.generate(x, 1), {"array", "tuple"}),
    "generate(max_new_tokens)": (lambda m, d, x: m.generate([1, 2], x), set()),
    "generate(sampler)": (lambda m, d, x: m.generate([1, 2], 1, sampler=x), {"None"}),
    "generate(attention_mask)": (lambda m, d, x: m.generate([1, 2], 1, attention_mask=x), {"None"}),
    "generate(on_token)": (lambda m, d, x: m.generate([1, 2], 1, on_token=x), {"None"}),
    "generate(routing)": (lambda m, d, x: d.generate([1, 2], 1, routing=x), {"None"}),
    "verify(input_ids)": (lambda m, d, x: m.verify(x), {"array", "tuple"}),
    "verify(attention_mask)": (lambda m, d, x: m.verify([1, 2], x), {"None"}),
    "verify(n_prompt)": (lambda m, d, x: m.verify([1, 2], n_prompt=x), {"None"}),
    "verify(sampler)": (lambda m, d, x: m.verify([1, 2], sampler=x), {"None"}),
    "save(path)": (lambda m, d, x: m.save(x), {"text", "path"}),
    "save(dtype)": (lambda m, d, x: m.save("out", dtype=x, overwrite=True), {"None"}),
    "save(max_shard_bytes)": (lambda m, d, x: m.save("out", max_shard_bytes=x, overwrite=True), {"huge", "beyond decimal"}),
    "save(overwrite)": (lambda m, d, x: m.save("out", overwrite=x), {"true", "numpy true"}),
    "save(progress)": (lambda m, d, x: m.save("out", overwrite=True, progress=x), {"None"}),
    "from_pretrained(path)": (lambda m, d, x: wse.from_pretrained(x), set()),
    "from_pretrained(wafer)": (lambda m, d, x: wse.from_pretrained(shipped_model(), cache_dir="c", wafer=x), {"None"}),
    "from_pretrained(progress)": (lambda m, d, x: wse.from_pretrained(shipped_model(), cache_dir="c", progress=x), {"None"}),
    "from_pretrained(resident_bytes)": (
        lambda m, d, x: wse.from_pretrained(shipped_model(), cache_dir="c", resident_bytes=x), {"zero", "huge", "beyond decimal"},
    ),
    "from_pretrained(cache_dir)": (lambda m, d, x: wse.from_pretrained(shipped_model(), cache_dir=x), {"None", "text", "path"}),
    "from_config(config)": (lambda m, d, x: wse.from_config(x), set()),
    "from_config(seed)": (lambda m, d, x: wse.from_config(CONFIG, seed=x), {"zero", "huge"}),
    "from_config(wafer)": (lambda m, d, x: wse.from_config(CONFIG, wafer=x), {"None"}),
    "from_config(max_tokens)": (lambda m, d, x: wse.from_config(CONFIG, max_tokens=x), {"None", "huge", "beyond decimal"}),
    "from_config(stream_experts)": (lambda m, d, x: wse.from_config(CONFIG, stream_experts=x), set()),
    "from_config(routing)": (lambda m, d, x: wse.from_config(CONFIG, routing=x), {"None"}),
    "from_config(prefill_chunk)": (lambda m, d, x: wse.from_config(CONFIG, prefill_chunk=x), {"None", "huge", "beyond decimal"}),
    "from_config(chunk)": (lambda m, d, x: wse.from_config(CONFIG, chunk=x), {"None", "huge", "beyond decimal"}),
    "from_config(prefetch_depth)": (lambda m, d, x: wse.from_config(CONFIG, prefetch_depth=x), {"zero", "huge", "beyond decimal"}),
    "Wafer(spec)": (lambda m, d, x: wse.Wafer(x, rows=2, cols=2), set()),
    "Wafer(rows)": (lambda m, d, x: wse.Wafer(rows=x, cols=2), {"None"}),
    "Wafer(cols)": (lambda m, d, x: wse.Wafer(rows=2, cols=x), {"None"}),
    "Wafer(executor)": (lambda m, d, x: wse.Wafer(rows=2, cols=2, executor=x), set()),
    "Sampler(greedy)": (lambda m, d, x: wse.Sampler(greedy=x), {"true", "numpy true"}),
    "Sampler(temperature)": (lambda m, d, x: wse.Sampler(temperature=x), {"fraction", "huge"}),
    "Sampler(top_k)": (lambda m, d, x: wse.Sampler(top_k=x), {"None", "huge", "beyond decimal"}),
    "Sampler(top_p)": (lambda m, d, x: wse.Sampler(top_p=x), set()),
    "Sampler(seed)": (lambda m, d, x: wse.Sampler(seed=x), {"zero", "huge"}),
}  # fmt: skip
"""A call for each argument of the face, and the values above that it takes."""


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments_are_refused_by_name(
    call: str, model: wse.WaferModel, dry: wse.WaferModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, taken = CALLS[call]
    argument = call.partition("(")[2][:-1]
    for label, value in JUNK.items():
        if call == "from_pretrained(cache_dir)" and label == "None":
            continue  # the user's own cache
        if label in taken or (call.endswith(("(on_token)", "(progress)")) and callable(value)):
            if not callable(value):
                function(model, dry, value)
            continue
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(wse.WseError) as caught:
            function(model, dry, value)
        said = str(caught.value)
        known = (f"`{argument}`", f"{argument}:", "new ones are more than the model's 64 positions")
        assert any(text in said for text in known) or said.startswith(f"{value}: "), f"{label}: {said}"
        assert len(said) < 500 or "known architectures" in said, f"{label}: {said}"
        assert sorted(os.listdir(tmp_path)) == before, f"{label} left something"
    assert not model.wafer.sram.live


def test_an_id_that_only_an_unsigned_integer_holds_is_shown_as_it_is(model: wse.WaferModel) -> None:
    with pytest.raises(wse.InputError, match=r"token 1: id 18446744073709551615 lies outside the vocabulary 0\.\.59"):
        model(np.array([1, 2**64 - 1], np.uint64))


@pytest.mark.parametrize("ids", [[], [[]], [[], []], [1.0, 2.0], ["a"], [60], [-1], [[1, 2], [3]], [[[1]]], [True], 5])
def test_prompts_that_are_none(model: wse.WaferModel, ids: Any) -> None:
    for function in (model, model.generate, model.verify):
        with pytest.raises(wse.InputError, match="`input_ids`"):
            function(ids)


def test_a_wrong_option_is_refused_before_the_weights_are_rewritten(tmp_path: Path) -> None:
    for wrong in ({"max_tokens": 0}, {"prefill_chunk": "4"}, {"stream_experts": "some"}, {"chunk": 1}, {"prefetch_depth": -1}):
        with pytest.raises(wse.SpecError, match=f"`{next(iter(wrong))}` must be"):
            wse.from_pretrained(shipped_model(), cache_dir=tmp_path, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "cols"), [(0, 1), (1, 0), (-3, 3), (1173, 1), (1, 763), (1 << 40, 1 << 40), (2.0, 2), (True, True)]
)  # fmt: skip
def test_a_grid_that_is_not_on_the_wafer(rows: Any, cols: Any) -> None:
    with pytest.raises(wse.SpecError, match=r"must be an integer in 1\.\.(1172|762) \(WSE-3 has 1172 x 762 cores\), got"):
        wse.Wafer(rows=rows, cols=cols)


def test_a_grid_that_is_too_small_names_the_way_out() -> None:
    model = wse.from_config({**CONFIG, "max_position_embeddings": 4096}, wafer=wse.Wafer(rows=1, cols=1))
    with pytest.raises(wse.SramOverflowError, match=r"core \(0, 0\): .* use more rows or columns"):
        model(np.zeros(3000, np.int64))
    with pytest.raises(wse.InputError, match="4000 tokens of prompt and 97 new ones are more than the model's 4096 positions"):
        model.generate(np.zeros(4000, np.int64), 97)
