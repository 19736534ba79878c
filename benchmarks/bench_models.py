"""A mid-size mixture of experts end to end: prefill of 512 tokens and decode, beside transformers in float32 where that is installed.

    python benchmarks/bench_models.py                # table; needs torch and transformers for the comparison
    pytest benchmarks/bench_models.py -m slow        # the emulator alone, under pytest-benchmark

The checkpoint (Mixtral's form: hidden 1024, 4 layers, 8 experts of 1792, top-2, 16 heads of 64, 4 key/value heads, vocabulary 8192, random
weights, 406 MB as bfloat16) and MemoryX's layout file (812 MB) are written to a temporary directory. Both sides work from the same file, in
float32, on the same prompt; results are compared before anything is timed, runs alternate A B A B, and medians are given. All numbers are
seconds of the host: they say what this emulator costs, nothing about a wafer.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import wse_emu as wse

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
ROWS = COLS = 32
PROMPT_TOKENS = 512
NEW_TOKENS = 16
TOLERANCE = 1e-4
"""Largest difference between the two sides' logits, in standard deviations."""

HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


class Times(NamedTuple):
    """Host seconds of one run."""

    prefill: float
    """From the call to the first new token."""
    decode: float
    """Median of the later tokens, each."""


Run = Callable[[], tuple[Times, list[int]]]
"""One greedy run from the prompt: its times and its new tokens."""


def write_checkpoint(directory: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> None:
    """Write config.json and model.safetensors with normal weights of deviation 0.02, norms of 1."""
    rng = np.random.default_rng(seed)
    h, f, d, vocab = config["hidden_size"], config["intermediate_size"], config["head_dim"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h), "lm_head.weight": (vocab, h), "model.norm.weight": (h,)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        shapes |= {f"{p}self_attn.{name}_proj.weight": (n, h) for name, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {p + "self_attn.o_proj.weight": (h, q), p + "block_sparse_moe.gate.weight": (config["num_local_experts"], h)}
        for e in range(config["num_local_experts"]):
            expert = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {expert + "w1.weight": (f, h), expert + "w2.weight": (h, f), expert + "w3.weight": (f, h)}
    tensors = {}
    for name, shape in shapes.items():
        values = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * np.float32(0.02)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def temporary_checkpoint() -> Iterator[Path]:
    """A checkpoint whose layout file lies beside it; both vanish afterwards."""
    with tempfile.TemporaryDirectory(prefix="wse-emu-bench-") as name:
        directory = Path(name) / "checkpoint"
        directory.mkdir()
        write_checkpoint(directory)
        before = os.environ.get("WSE_EMU_CACHE_DIR")
        os.environ["WSE_EMU_CACHE_DIR"] = str(Path(name) / "cache")
        try:
            yield directory
        finally:
            if before is None:
                del os.environ["WSE_EMU_CACHE_DIR"]
            else:
                os.environ["WSE_EMU_CACHE_DIR"] = before


def prompt_ids(n_tokens: int) -> NDArray[np.int64]:
    """Random prompt, (1, n_tokens)."""
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (1, n_tokens))


def emulator_run(model: wse.WaferModel, ids: NDArray[np.int64], new_tokens: int) -> Run:
    """Greedy run of the emulator."""

    def run() -> tuple[Times, list[int]]:
        stamps = [time.perf_counter()]
        out = model.generate(ids, max_new_tokens=new_tokens, on_token=lambda _step, _ids: stamps.append(time.perf_counter()))
        gaps = [b - a for a, b in itertools.pairwise(stamps)]
        return Times(gaps[0], statistics.median(gaps[1:])), [int(i) for i in np.asarray(out)[0, ids.shape[1] :]]

    return run


def transformers_run(model: Any, ids: NDArray[np.int64], new_tokens: int) -> Run:
    """Greedy run of transformers, with its key/value cache; like `generate`, prefill computes the last token's logits only."""
    import torch

    def run() -> tuple[Times, list[int]]:
        step, cache, tokens = torch.from_numpy(ids), None, []
        stamps = [time.perf_counter()]
        with torch.inference_mode():
            for _ in range(new_tokens):
                out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens.append(int(step))
                stamps.append(time.perf_counter())
        gaps = [b - a for a, b in itertools.pairwise(stamps)]
        return Times(gaps[0], statistics.median(gaps[1:])), tokens

    return run


def check_logits(model: wse.WaferModel, peer: Any, ids: NDArray[np.int64]) -> float:
    """Largest difference between the two sides' logits in standard deviations; raises if it is above the tolerance."""
    import torch

    with torch.inference_mode():
        expected = peer(torch.from_numpy(ids)).logits.numpy()
    difference = float(np.abs(model(ids).logits - expected).max() / expected.std())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the two sides differ by {difference:.1e} standard deviations of the logits: nothing is timed")
    return difference


def main(argv: list[str] | None = None) -> None:
    """Write the checkpoint, compare, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--cols", type=int, default=COLS)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    ids = prompt_ids(args.prompt_tokens)
    with temporary_checkpoint() as directory:
        started = time.perf_counter()
        model = wse.from_pretrained(directory, wafer=wse.Wafer(wse.WSE3, rows=args.rows, cols=args.cols))
        print(f"layout file made in {time.perf_counter() - started:.1f} s")
        sides: dict[str, Run] = {"wse-emu": emulator_run(model, ids, args.new_tokens)}
        if HAS_TRANSFORMERS:
            import torch
            import transformers

            transformers.utils.logging.disable_progress_bar()
            peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            print(f"logits of {args.prompt_tokens} tokens agree to {check_logits(model, peer, ids):.1e} standard deviations")
            sides["transformers"] = transformers_run(peer, ids, args.new_tokens)
            print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
        else:
            print(model.verify(ids[:, :16]))
        tokens = {name: run()[1] for name, run in sides.items()}  # also compiles and warms up
        if any(t != tokens["wse-emu"] for t in tokens.values()):
            raise SystemExit(f"the two sides choose different tokens: {tokens}")
        times: dict[str, list[Times]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, run in sides.items():
                times[name].append(run()[0])
    report(times, args)


def report(times: dict[str, list[Times]], args: argparse.Namespace) -> None:
    """Print medians, their spread, and the ratio to the last side."""
    print(f"\n{args.rows} x {args.cols} cores, {args.repeats} runs each, alternating; host seconds, median (smallest to largest)\n")
    print(f"{'':14}{f'prefill of {args.prompt_tokens}':>28}{'tokens/s':>10}{'decode, one token':>28}{'tokens/s':>10}")
    medians = {}
    for name, runs in times.items():
        columns = [[getattr(t, key) for t in runs] for key in Times._fields]
        medians[name] = Times(*(statistics.median(c) for c in columns))
        cells = [f"{statistics.median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
        rates = args.prompt_tokens / medians[name].prefill, 1 / medians[name].decode
        print(f"{name:14}{cells[0]:>28}{rates[0]:>10.1f}{cells[1]:>28}{rates[1]:>10.2f}")
    if "transformers" in medians:
        ratio = [a / b for a, b in zip(medians["wse-emu"], medians["transformers"], strict=True)]
        print(f"\nwse-emu / transformers: prefill {ratio[0]:.2f}, decode {ratio[1]:.2f}")


@pytest.fixture(scope="module")
def model() -> Iterator[wse.WaferModel]:
    """The mid-size model on 32 x 32 cores, verified and compiled."""
    with temporary_checkpoint() as directory:
        model = wse.from_pretrained(directory, wafer=wse.Wafer(wse.WSE3, rows=ROWS, cols=COLS))
        report = model.verify(prompt_ids(16))
        assert report.passed, str(report)
        yield model


@pytest.mark.slow
def test_prefill(benchmark: Any, model: wse.WaferModel) -> None:
    ids = prompt_ids(PROMPT_TOKENS)
    benchmark.extra_info["tokens"] = ids.size
    benchmark.pedantic(model.generate, args=(ids,), kwargs={"max_new_tokens": 1}, rounds=3, warmup_rounds=1)


@pytest.mark.slow
def test_decode(benchmark: Any, model: wse.WaferModel) -> None:
    run = emulator_run(model, prompt_ids(PROMPT_TOKENS), NEW_TOKENS)
    run()
    benchmark.extra_info["seconds_per_token"] = run()[0].decode
    benchmark.pedantic(run, rounds=2)


if __name__ == "__main__":
    main()
