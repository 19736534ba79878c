"""Make the golden files of ``tests/golden``: tiny random checkpoints, what transformers computes from them, and which mistakes they catch.

    python tools/make_golden.py [--out DIR] [--only files|mistakes] [NAME ...]      # needs torch and transformers (the `oracle` extra)

Every directory holds ``config.json``, ``model.safetensors`` and ``golden.npz``; `golden_models` says what the checkpoints are,
`golden_tensors` what is in them, and ``MISTAKES.md`` is the table of `golden_table`. The seed of each checkpoint is the first one, from a
number that its name gives, for which no answer hangs by a thread: neighbouring scores of a router, down to the first expert that is not
chosen, lie at least `ROUTER_MARGIN` or `SCORE_MARGIN` apart, and every greedy token leads by `TOKEN_MARGIN` of the logits' standard
deviation. Tests may therefore ask for identical experts and tokens.

Keys of ``golden.npz``; CASE is ``t1``, ``t17``, ``t96`` (one sequence of that many tokens) or ``padded`` (two, padded on the left):

``CASE.input_ids``, ``CASE.attention_mask`` (batch, tokens) int64
``CASE.logits`` (batch, tokens, vocab), ``CASE.hidden`` (layers + 1, batch, tokens, hidden) float32
    The embedding's output, then what each layer adds up to, the last one *before* the final norm. (transformers gives the last entry of its
    ``hidden_states`` *after* the norm; here all are caught at the layers.) Not stored for ``t96``, to keep the files small.
``CASE.router_logits`` (layers, batch, tokens, experts), ``CASE.topk_ids``, ``CASE.topk_weights`` (layers, batch, tokens, k)
    Of layers with a mixture of experts.
``CASE.generated`` (batch, tokens + 12) int64
    Greedy, prompt included.

Where a position is padding, every stored value is zero. All is computed in float32, whatever the weights are stored in.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_models import CHECKPOINTS, Config
from golden_oracle import Oracle, TooCloseError, consult, load
from golden_table import write_table
from golden_tensors import NEW_TOKENS, prompts, random_tensors
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).resolve().parents[1] / "tests" / "golden"


def write_checkpoint(directory: Path, config: Config, seed: int) -> None:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(random_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})


def stored(case: str, ids: Tensor, mask: Tensor, oracle: Oracle) -> dict[str, NDArray[Any]]:
    """One case's arrays, by key."""
    real = mask[..., None]
    values = {"input_ids": ids, "attention_mask": mask, "logits": oracle.logits * real, "generated": oracle.generated}
    if case != "t96":
        values["hidden"] = oracle.hidden * real
    if oracle.router_logits is not None and oracle.topk_ids is not None and oracle.topk_weights is not None:
        values["router_logits"] = oracle.router_logits * real
        values["topk_ids"] = oracle.topk_ids * real
        values["topk_weights"] = oracle.topk_weights * real
    return {f"{case}.{name}": value.numpy() for name, value in values.items()}


def make(name: str, config: Config, out: Path) -> int:
    """Write one checkpoint and its golden file with the first seed that leaves margins; return the seed."""
    directory, first = out / name, zlib.crc32(name.encode())
    for seed in range(first, first + 10_000):
        write_checkpoint(directory, config, seed)
        model = load(directory)
        arrays: dict[str, NDArray[Any]] = {}
        try:
            for case, (ids, mask) in prompts(config, seed).items():
                oracle = consult(model, ids, mask, new_tokens=NEW_TOKENS)
                oracle.check_margins()
                arrays |= stored(case, ids, mask, oracle)
        except TooCloseError:
            continue
        arrays["made_with"] = np.array(
            f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32, seed {seed}"
        )
        np.savez_compressed(directory / "golden.npz", **arrays)
        return seed
    raise SystemExit(f"{name}: no seed leaves the margins")


def main(argv: list[str] | None = None) -> None:
    """Make the golden directories, all or those named, and the table of mistakes over all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("files", "mistakes"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of checkpoints to make; all by default")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.only != "mistakes":
        for name in args.names or CHECKPOINTS:
            seed = make(name, CHECKPOINTS[name], args.out)
            sizes = {path.name: path.stat().st_size for path in sorted((args.out / name).iterdir())}
            print(f"{name}: seed {seed}, bytes {sizes}", flush=True)
    if args.only != "files":
        write_table(args.out, {CHECKPOINTS[name]["model_type"] for name in args.names})


if __name__ == "__main__":
    main()
