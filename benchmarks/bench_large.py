"""A model larger than the memory it may take: saved, opened, streamed and decoded under a limit, and what each token streams is counted.

    python -m benchmarks.bench_large                       # a checkpoint of 4 GB under 1 GB; needs Linux and three times its size of disk
    python -m benchmarks.bench_large --gigabytes 0.5

The model has Qwen3-MoE's form (64 experts, 8 for each token), random weights, and is stored as bfloat16; MemoryX's layout file takes twice
as much. Saving, making the layout file and running happen in a process each, which the system itself holds to the limit: ``RLIMIT_DATA``
counts every private writable mapping, touched or not, so that what goes beyond it fails with a `MemoryError`. The peak of resident
anonymous memory is sampled beside it. Weights are mapped from the layout file: clean pages of the file cache, no anonymous memory.

What a forward pass streams follows from the routing that it recorded: attention, norms, router and head, and of each layer the experts
that some token chose. The ledger's bytes must be exactly that. The exit code is 0 if all of it holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import wse_emu as wse
from benchmarks.processes import AnonymousPeak, python
from wse_emu.checkpoint import open_checkpoint
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.memoryx import open_store

GIGABYTE = 10**9
N_EXPERTS, TOP_K = 64, 8
ROWS = COLS = 32
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
SMALL_BYTES = 400_000_000
"""Checkpoints below this are as deep, and narrower."""


def config_of(checkpoint_bytes: float) -> dict[str, Any]:
    """Configuration whose checkpoint has about that size as bfloat16, and at least two layers."""
    hidden = 1024 if checkpoint_bytes >= SMALL_BYTES else 128
    heads = hidden // 64
    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "vocab_size": 32 * hidden, "hidden_size": hidden, "intermediate_size": hidden,
        "moe_intermediate_size": hidden // 2, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4), "head_dim": 64, "num_experts": N_EXPERTS, "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True, "max_position_embeddings": 4096, "rope_theta": 1e6, "eos_token_id": None,
    }  # fmt: skip
    of_layer = 4 * hidden * 64 * heads + N_EXPERTS * 3 * hidden * (hidden // 2)
    rest = checkpoint_bytes / BFLOAT16_BYTES - 2 * config["vocab_size"] * hidden
    return {**config, "num_hidden_layers": max(2, round(rest / of_layer))}


def streamed_bytes(config: dict[str, Any], trace: RoutingTrace, cols: int) -> int:
    """What one forward pass must stream, from the configuration and the experts chosen: every matrix once, as the checkpoint stores it."""
    h, d, f = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    q, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_norms = 2 * d * min(kv, cols)  # a head's columns together receive it once; with several heads on a column, that column does
    n_layers = config["num_hidden_layers"]
    vectors = n_layers * (2 * h + head_norms) + h
    matrices = n_layers * (h * (q + 2 * kv) * d + q * d * h + h * config["num_experts"]) + h * config["vocab_size"]
    for layer in range(n_layers):
        matrices += len(set(trace.layer(layer).ravel().tolist())) * 3 * h * f
    return FLOAT32_BYTES * vectors + BFLOAT16_BYTES * matrices


# ---- what runs in processes of its own


def save(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Save the model as bfloat16."""
    wse.from_config(config, seed=0).save(directory / "model", dtype="bfloat16")
    return {"bytes": sum(p.stat().st_size for p in (directory / "model").iterdir())}


def build(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Make MemoryX's layout file, verified."""
    with open_checkpoint(directory / "model") as checkpoint:
        store = open_store(checkpoint, cache_dir=directory)
        store.close()
        return {"bytes": store.path.stat().st_size}


def run(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt and decode; bytes streamed by each forward pass, counted and expected."""
    n_prompt, n_new = config.pop("prompt_tokens"), config.pop("new_tokens")
    wafer = wse.Wafer(wse.WSE3, rows=ROWS, cols=COLS)
    model = wse.from_pretrained(directory / "model", wafer=wafer, cache_dir=directory)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], n_prompt)
    ends, seconds = [0], [time.perf_counter()]

    def note(_step: int, _ids: Any) -> None:
        ends.append(len(wafer.ledger))
        seconds.append(time.perf_counter())

    out = model.generate(ids, max_new_tokens=n_new, on_token=note)
    assert out.shape == (n_prompt + n_new,)
    events = wafer.ledger.events()
    counted = [sum(e.bytes for e in events[a:b] if e.kind == "stream") for a, b in itertools.pairwise(ends)]
    expected = [streamed_bytes(config, trace, COLS) for trace in model.recorded_routing]
    experts = [[len(np.unique(ids)) for ids in trace.topk_ids] for trace in model.recorded_routing]
    return {
        "bytes": sum(counted), "counted": counted, "expected": expected, "experts": experts,
        "seconds_per_pass": np.diff(seconds).tolist(),
    }  # fmt: skip


def limited(role: str, directory: Path, limit_bytes: int, config: dict[str, Any]) -> None:
    """Body of a process: do the work under the limit, and print what it took as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    start = time.perf_counter()
    with AnonymousPeak() as peak:
        result = {"save": save, "build": build, "run": run}[role](directory, config)
    print(json.dumps({**result, "seconds": time.perf_counter() - start, "anonymous_mb": peak.mb}))


# ---- the comparison


def check(passes: dict[str, Any], n_layers: int, n_new: int) -> list[str]:
    """What is wrong with the bytes of a run; empty if nothing is."""
    wrong = []
    if not len(passes["counted"]) == len(passes["expected"]) == n_new:
        wrong.append(f"{len(passes['counted'])} passes counted, {len(passes['expected'])} recorded, {n_new} tokens were asked for")
    for i, (counted, expected) in enumerate(zip(passes["counted"], passes["expected"], strict=False)):
        if counted != expected:
            wrong.append(f"pass {i} streamed {counted} bytes, its routing asks for {expected}")
    if any(experts != [TOP_K] * n_layers for experts in passes["experts"][1:]):
        wrong.append(f"a decoded token did not choose {TOP_K} experts in each of {n_layers} layers")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Save, build and run, each under the limit; print what each took and what each token streamed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--limit-gigabytes", type=float, default=1.0, help="RLIMIT_DATA of every process")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--directory", help="where to write; a temporary directory by default, removed afterwards")
    args = parser.parse_args(argv)
    config, limit = config_of(args.gigabytes * GIGABYTE), int(args.limit_gigabytes * GIGABYTE)
    with tempfile.TemporaryDirectory(prefix="wse-emu-large-", dir=args.directory) as name:
        free = shutil.disk_usage(name).free
        if free < 3.2 * args.gigabytes * GIGABYTE:
            raise SystemExit(f"{name}: checkpoint and layout file need {3.2 * args.gigabytes:.1f} GB, {free / GIGABYTE:.1f} are free")
        print(f"{config['num_hidden_layers']} layers of {N_EXPERTS} experts, {TOP_K} for each token, hidden {config['hidden_size']}, "
              f"{ROWS} x {COLS} cores; RLIMIT_DATA {limit / GIGABYTE:g} GB")  # fmt: skip
        results = {}
        for role in ("save", "build", "run"):
            work = {**config, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens} if role == "run" else config
            out = python(["-m", "benchmarks.bench_large", "--child", role, name, str(limit), json.dumps(work)])
            result = results[role] = json.loads(out)
            amount = {"save": "checkpoint", "build": "layout file", "run": "streamed"}[role]
            print(f"{role:6}{result['seconds']:8.1f} s   {amount} {result['bytes'] / GIGABYTE:.3f} GB   "
                  f"anonymous memory {result['anonymous_mb'] * 2**20 / GIGABYTE:.3f} GB at most", flush=True)  # fmt: skip
    passes = results["run"]
    for i, (counted, expected) in enumerate(zip(passes["counted"], passes["expected"], strict=True)):
        what = f"prompt of {args.prompt_tokens}" if i == 0 else f"token {i}"
        print(f"  {what:14} {counted:14,d} bytes streamed, {expected:14,d} by its routing, {passes['seconds_per_pass'][i]:.2f} s")
    wrong = check(passes, config["num_hidden_layers"], args.new_tokens)
    wrong += [f"{role}: above the limit" for role, r in results.items() if r["anonymous_mb"] * 2**20 > limit]
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        limited(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
        sys.exit(0)
    sys.exit(main())
