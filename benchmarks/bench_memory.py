"""Anonymous memory of a run: the same for 4 and for 12 layers but for their keys and values, since weights stay in the mapped layout file.

Run as a script: ``python -m benchmarks.bench_memory``. Each size runs in a process of its own; needs Linux and about 3 GB of disk.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

import wse_emu as wse
from benchmarks.processes import AnonymousPeak, python
from wse_emu.checkpoint import random_checkpoint
from wse_emu.engine.options import EngineOptions
from wse_emu.memoryx import open_store
from wse_emu.model import WaferModel

LAYERS = (4, 12)
LIMIT_MB = 600.0
N_PROMPT, N_NEW = 512, 8
TOLERANCE = 0.05


def config(n_layers: int) -> dict[str, object]:
    """The mid-size Mixtral."""
    return {
        "model_type": "mixtral", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": n_layers,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024, "rope_theta": 1e4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "eos_token_id": None,
    }  # fmt: skip


def measure(n_layers: int, cache_dir: str) -> float:
    """Peak anonymous memory while 512 tokens are read and 8 generated, on 32 x 32 cores."""
    checkpoint = random_checkpoint(config(n_layers), seed=0)
    store = open_store(checkpoint, cache_dir=cache_dir)
    model = WaferModel(checkpoint, store, wse.Wafer(wse.WSE3, rows=32, cols=32), None, None, EngineOptions())
    ids = np.random.default_rng(0).integers(0, 8192, N_PROMPT)
    model.generate(ids[:4], max_new_tokens=2)  # kernels are loaded
    with AnonymousPeak() as peak:
        model.generate(ids, max_new_tokens=N_NEW)
    return peak.mb


def main() -> int:
    """Measure each size in its own process and compare."""
    with tempfile.TemporaryDirectory() as cache_dir:
        peaks, bare = [], []
        for n_layers in LAYERS:
            # The layout file is made in a process of its own: what building it takes is no part of a run.
            for _ in ("build", "run"):
                out = python(["-m", "benchmarks.bench_memory", str(n_layers), cache_dir])
            peaks.append(float(out))
            keys_and_values = n_layers * (N_PROMPT + N_NEW) * 2 * 4 * 64 * 4 / 2**20
            bare.append(peaks[-1] - keys_and_values)
            print(f"{n_layers:>3} layers: {peaks[-1]:.1f} MB anonymous at most, {keys_and_values:.1f} MB of them keys and values")
    ratio = bare[-1] / bare[0]
    print(f"ratio {peaks[-1] / peaks[0]:.3f}; without keys and values {ratio:.3f}")
    return 0 if abs(ratio - 1) <= TOLERANCE and max(peaks) < LIMIT_MB else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(int(sys.argv[1]), sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
