"""Two mid-size mixtures of experts end to end, prompt and decode, beside transformers in float32 where that is installed.

    pytest benchmarks/bench_models.py --benchmark-only

Random weights of Mixtral's form (8 experts of 1792, top-2) and of Qwen3-MoE's (32 experts of 512, top-4); both have hidden 1024, 4 layers,
16 heads of 64, 4 key/value heads and a vocabulary of 8192. The checkpoint, bfloat16, and MemoryX's layout file are temporary files. Both
sides work from that checkpoint in float32 on one prompt; logits and tokens are compared before anything is timed, and runs alternate.
Transformers runs with the experts of its own choice, and with its plain loop over experts.
"""

from __future__ import annotations

import inspect
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from benchmarks.racing import HAS_TRANSFORMERS, Race, Work
from wse_emu.wafer.ledger import ForwardPass
from wse_kernels.threads import n_threads

MID: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
    "sliding_window": None, "bos_token_id": None, "eos_token_id": None, "dtype": "bfloat16",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {**MID, "model_type": "mixtral", "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3-MoE": {
        **MID, "model_type": "qwen3_moe", "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
"""What makes either of them tiny, for smoke runs."""
REPEATS = 7
LOGIT_TOLERANCE = 1e-4
"""Largest difference between the two sides' logits, in their standard deviations."""
CLEAR = 2e-5
"""Least difference between the router scores of the last expert chosen and of the first one passed over."""
N_DRAWS = 50

Ids = NDArray[np.int64]


class Sizes(NamedTuple):
    """Grid, prompt and new tokens."""

    rows: int
    cols: int
    n_prompt: int
    n_new: int


class Times(NamedTuple):
    """Host seconds of one run."""

    prompt: float
    """From the call to the first new token."""
    token: float
    """Median of the later tokens, each."""

    def shorter(self, other: Times) -> Times:
        """The shorter of both, each."""
        return Times(min(self.prompt, other.prompt), min(self.token, other.token))


Run = Callable[[], tuple[Times, list[int]]]
"""One greedy run from the prompt: its times and its new tokens."""


def _times(stamps: list[float]) -> Times:
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    return Times(gaps[0], statistics.median(gaps[1:]))


def clear_prompt(model: wse.WaferModel, n_tokens: int, top_k: int) -> Ids:
    """A random prompt, (1, n_tokens), in which no choice of experts hangs on a rounding.

    Two float32 programs that sum in different orders may choose differently where two scores all but agree, and both are right.
    """
    for seed in range(N_DRAWS):
        ids = np.random.default_rng(seed).integers(0, model.spec.vocab_size, (1, n_tokens))
        scores = model(ids, output_router_logits=True).router_logits
        assert scores
        ranked = [np.sort(of_layer, axis=-1) for of_layer in scores]
        if min(float((r[..., -top_k] - r[..., -top_k - 1]).min()) for r in ranked) >= CLEAR:
            return ids
    raise AssertionError(f"no prompt of {N_DRAWS} chooses its experts by {CLEAR} or more")


def emulator_run(model: wse.WaferModel, ids: Ids, n_new: int) -> Run:
    """Greedy run of the emulator."""

    def run() -> tuple[Times, list[int]]:
        stamps = [perf_counter()]
        out = model.generate(ids, max_new_tokens=n_new, on_token=lambda _step, _ids: stamps.append(perf_counter()))
        return _times(stamps), [int(i) for i in out[0, ids.shape[1] :]]

    return run


def transformers_run(model: Any, ids: Ids, n_new: int, experts: str) -> Run:
    """Greedy run of transformers, with its key/value cache; like `generate`, the prompt's pass computes the last token's logits only."""
    import torch

    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed within version 5

    def run() -> tuple[Times, list[int]]:
        model.set_experts_implementation(experts)
        step, cache, tokens = torch.from_numpy(ids), None, []
        stamps = [perf_counter()]
        with torch.inference_mode():
            for _ in range(n_new):
                out = model(step, **{named: cache}, use_cache=True, logits_to_keep=1)
                cache, step = getattr(out, named), out.logits[:, -1:].argmax(-1)
                tokens.append(int(step))
                stamps.append(perf_counter())
        return _times(stamps), tokens

    return run


def peers_of(directory: Path, model: wse.WaferModel, ids: Ids, n_new: int) -> dict[str, Run]:
    """Runs of transformers whose logits agree with the emulator's; none where it is not installed."""
    if not HAS_TRANSFORMERS:
        assert model.verify(ids[:, :16]).passed
        return {}
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(n_threads())
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = peer(torch.from_numpy(ids)).logits.numpy()
    difference = np.abs(model(ids).logits - expected).max() / expected.std()
    assert difference <= LOGIT_TOLERANCE, f"the two sides' logits differ by {difference:.1e} standard deviations"
    own_choice = peer.config._experts_implementation
    runs = {"transformers": transformers_run(peer, ids, n_new, own_choice)}
    if own_choice != "eager":
        runs["transformers, eager"] = transformers_run(peer, ids, n_new, "eager")
    return runs


def work_of(wafer: wse.Wafer, one: ForwardPass) -> Work:
    """Multiply-adds of a forward pass, and the bytes of its weights in MemoryX: float32, a wavelet each, whatever the checkpoint has."""
    totals = wafer.ledger.totals(("kind",), one.start, one.stop)
    return Work(sum(row["macs"] for row in totals), sum(4 * row["wavelets"] for row in totals if row["kind"] == "stream"), one.n_tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_model(name: str, benchmark: Any, race: Race, smoke: bool, tmp_path: Path) -> None:
    sizes = Sizes(2, 3, 6, 3) if smoke else Sizes(32, 32, 512, 16)
    config = {**CONFIGS[name], **TINY} if smoke else CONFIGS[name]
    wse.from_config(config, seed=0).save(tmp_path / "model", dtype="bfloat16")
    wafer = wse.Wafer(wse.WSE3, rows=sizes.rows, cols=sizes.cols)
    model = wse.from_pretrained(tmp_path / "model", wafer=wafer, cache_dir=tmp_path / "cache")
    ids = clear_prompt(model, sizes.n_prompt, config["num_experts_per_tok"])
    runs = {"": emulator_run(model, ids, sizes.n_new), **peers_of(tmp_path / "model", model, ids, sizes.n_new)}
    tokens = {side: run()[1] for side, run in runs.items()}  # also compiles and warms up
    assert all(chosen == tokens[""] for chosen in tokens.values()), f"the sides choose different tokens: {tokens}"

    wafer.ledger.clear()
    runs[""]()
    prompt, *_, token = wafer.ledger.passes()
    best: dict[str, Times] = {}

    def turn(side: str) -> None:
        times, _ = runs[side]()
        best[side] = times.shorter(best.get(side, times))

    def others() -> None:
        for side in runs:
            if side:
                turn(side)

    benchmark.pedantic(turn, args=("",), setup=others, rounds=1 if smoke else REPEATS)
    for what, one in (("prompt", prompt), ("token", token)):
        peers = {side: getattr(times, what) for side, times in best.items() if side}
        race.note(getattr(best[""], what), peers, work_of(wafer, one), f" {what}")
    model.close()
