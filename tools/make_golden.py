"""Make the golden files of ``tests/golden``: tiny random checkpoints and what transformers computes from them in float32.

    python tools/make_golden.py [--out DIR]          # needs torch and transformers (the `oracle` extra)

Every directory holds ``config.json``, ``model.safetensors`` and ``golden.npz``. Weights come from NumPy's generator, are rounded to the
stored dtype, and are scaled so that neither attention nor routing is near uniform. The seed of each checkpoint is the first one for which
no answer hangs by a thread: neighbouring router logits, down to the first expert that is not chosen, lie at least `ROUTER_MARGIN` apart,
and every greedy token leads by `TOKEN_MARGIN` of the logits' standard deviation. Tests may therefore ask for identical experts and tokens.

Keys of ``golden.npz``; CASE is ``t1``, ``t17``, ``t96`` (one sequence of that many tokens) or ``padded`` (two, the second padded
on the left):

``CASE.input_ids``, ``CASE.attention_mask`` (batch, tokens) int64
``CASE.logits`` (batch, tokens, vocab), ``CASE.hidden`` (layers + 1, batch, tokens, hidden) float32
    The embedding's output, then what each layer adds up to, the last one *before* the final norm. (transformers gives the last entry of its
    ``hidden_states`` *after* the norm; here all are caught at the layers.) Not stored for ``t96``, to keep the files small.
``CASE.router_logits`` (layers, batch, tokens, experts), ``CASE.topk_ids``, ``CASE.topk_weights`` (layers, batch, tokens, k)
    Mixtral only.
``CASE.generated`` (batch, tokens + 24) int64
    Greedy, prompt included.

Where a position is padding, every stored value is zero.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).resolve().parents[1] / "tests" / "golden"
ROUTER_MARGIN = 5e-4
TOKEN_MARGIN = 2e-3
NEW_TOKENS = 24
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTRAL = COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 59,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
CHECKPOINTS = {
    "mixtral-float32": MIXTRAL | {"torch_dtype": "float32"},
    "mixtral-bfloat16": MIXTRAL | {"torch_dtype": "bfloat16"},
    "llama-float32": LLAMA | {"torch_dtype": "float32"},
    "llama-bfloat16": LLAMA | {"torch_dtype": "bfloat16"},
}


class TooCloseError(Exception):
    """An answer hangs by less than the margin; another seed is needed."""


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Tensors under the names of released checkpoints, in the dtype that `config` states."""
    rng = np.random.default_rng(seed)
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n_q, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    tensors: dict[str, NDArray[np.float64]] = {}

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        tensors[name] = rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)

    def norm(name: str) -> None:
        tensors[name] = 1 + 0.3 * rng.standard_normal(h)

    tensors["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], h)) * (0.3 if config["tie_word_embeddings"] else 1.0)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        norm(p + "input_layernorm.weight")
        matrix(p + "self_attn.q_proj.weight", n_q * d, h, 1.5)
        matrix(p + "self_attn.k_proj.weight", n_kv * d, h, 1.5)
        matrix(p + "self_attn.v_proj.weight", n_kv * d, h)
        matrix(p + "self_attn.o_proj.weight", h, n_q * d, 1.5)
        norm(p + "post_attention_layernorm.weight")
        if config["model_type"] == "mixtral":
            matrix(p + "block_sparse_moe.gate.weight", config["num_local_experts"], h, 2.0)
            for e in range(config["num_local_experts"]):
                q = f"{p}block_sparse_moe.experts.{e}."
                matrix(q + "w1.weight", f, h, 1.5)
                matrix(q + "w3.weight", f, h, 1.5)
                matrix(q + "w2.weight", h, f, 1.5)
        else:
            matrix(p + "mlp.gate_proj.weight", f, h, 1.5)
            matrix(p + "mlp.up_proj.weight", f, h, 1.5)
            matrix(p + "mlp.down_proj.weight", h, f, 1.5)
    norm("model.norm.weight")
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], h)
    dtype = STORED[config["torch_dtype"]]
    return {name: torch.from_numpy(a).to(torch.float32).to(dtype).contiguous() for name, a in tensors.items()}


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> None:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(random_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What transformers computes in float32; names and shapes as in the module's text, padding not yet cleared."""

    logits: Tensor
    hidden: Tensor
    router_logits: Tensor | None
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    generated: Tensor


@torch.no_grad()
def load(directory: Path) -> Any:
    """Load a checkpoint in float32 with plain attention and experts; refuse one that transformers would complete with random weights."""
    config = AutoConfig.from_pretrained(directory)
    options = {"experts_implementation": "eager"} if config.model_type == "mixtral" else {}  # the default needs widths divisible by 4
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    wrong = {key: value for key, value in info.items() if value and key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong:
        raise SystemExit(f"{directory}: transformers does not load the checkpoint completely: {wrong}")
    return model.eval()


@torch.no_grad()
def consult(model: Any, ids: Tensor, mask: Tensor, *, new_tokens: int = NEW_TOKENS) -> Oracle:
    """Run the model on ``(batch, tokens)`` ids; positions count real tokens only."""
    b, t = ids.shape
    caught: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: caught.append(out)) for layer in model.model.layers]
    is_moe = model.config.model_type == "mixtral"
    options = {"output_router_logits": True} if is_moe else {}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False, **options)
    for hook in hooks:
        hook.remove()
    router = ids_ = weights = None
    if is_moe:
        router = torch.stack([r.view(b, t, -1) for r in out.router_logits])
        weights, ids_ = router.softmax(-1).topk(model.config.num_experts_per_tok, -1)
        weights = weights / weights.sum(-1, keepdim=True)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    hidden = torch.stack([out.hidden_states[0], *caught])
    return Oracle(logits=out.logits, hidden=hidden, router_logits=router, topk_ids=ids_, topk_weights=weights, generated=generated)


@torch.no_grad()
def margins(model: Any, oracle: Oracle, mask: Tensor) -> tuple[float, float]:
    """Smallest distance of neighbouring router logits down to the first one not chosen, and smallest lead of a greedy token in std."""
    n_new = oracle.generated.shape[1] - mask.shape[1]
    full = torch.cat((mask, torch.ones(mask.shape[0], n_new, dtype=mask.dtype)), 1)
    positions = (full.cumsum(-1) - 1).clamp_min(0)
    options = {"output_router_logits": True} if model.config.model_type == "mixtral" else {}
    out = model(oracle.generated, attention_mask=full, position_ids=positions, use_cache=False, **options)
    router_margin = float("inf")
    if options:
        k = model.config.num_experts_per_tok
        for r in out.router_logits:
            best = r.view(*full.shape, -1)[full.bool()].sort(-1, descending=True).values[:, : k + 1]
            if best.shape[1] > 1:
                router_margin = min(router_margin, float((best[:, :-1] - best[:, 1:]).min()))
    two = out.logits[:, mask.shape[1] - 1 : -1].topk(2, -1).values
    return router_margin, float((two[..., 0] - two[..., 1]).min() / out.logits[full.bool()].std())


def check_margins(model: Any, oracle: Oracle, mask: Tensor) -> None:
    """Raise TooCloseError if an expert or a token is chosen by less than the margin."""
    router_margin, token_margin = margins(model, oracle, mask)
    if router_margin < ROUTER_MARGIN or token_margin < TOKEN_MARGIN:
        raise TooCloseError(f"router margin {router_margin:.1e}, token margin {token_margin:.1e}")


def prompts(vocab_size: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Case to (input_ids, attention_mask)."""
    rng = np.random.default_rng(1000 + seed)
    cases = {}
    for t in (1, 17, 96):
        ids = torch.from_numpy(rng.integers(0, vocab_size, (1, t)))
        cases[f"t{t}"] = (ids, torch.ones_like(ids))
    ids = torch.from_numpy(rng.integers(0, vocab_size, (2, 21)))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    cases["padded"] = (ids * mask, mask)
    return cases


def make(name: str, config: dict[str, Any], out: Path) -> int:
    """Write one checkpoint and its golden file with the first seed that leaves margins; return the seed."""
    directory = out / name
    for seed in range(10_000):
        write_checkpoint(directory, config, seed)
        model = load(directory)
        arrays: dict[str, NDArray[Any]] = {}
        try:
            for case, (ids, mask) in prompts(config["vocab_size"], seed).items():
                oracle = consult(model, ids, mask)
                check_margins(model, oracle, mask)
                real = mask[..., None].float()
                arrays[f"{case}.input_ids"] = ids.numpy()
                arrays[f"{case}.attention_mask"] = mask.numpy()
                arrays[f"{case}.logits"] = (oracle.logits * real).numpy()
                if case != "t96":
                    arrays[f"{case}.hidden"] = (oracle.hidden * real).numpy()
                if oracle.router_logits is not None and oracle.topk_ids is not None and oracle.topk_weights is not None:
                    arrays[f"{case}.router_logits"] = (oracle.router_logits * real).numpy()
                    arrays[f"{case}.topk_ids"] = (oracle.topk_ids * mask[..., None]).numpy()
                    arrays[f"{case}.topk_weights"] = (oracle.topk_weights * real).numpy()
                arrays[f"{case}.generated"] = oracle.generated.numpy()
        except TooCloseError:
            continue
        arrays["made_with"] = np.array(
            f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32, seed {seed}"
        )
        np.savez_compressed(directory / "golden.npz", **arrays)
        return seed
    raise SystemExit(f"{name}: no seed leaves the margins")


def main(argv: list[str] | None = None) -> None:
    """Make all golden directories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name, config in CHECKPOINTS.items():
        seed = make(name, config, args.out)
        sizes = {path.name: path.stat().st_size for path in sorted((args.out / name).iterdir())}
        print(f"{name}: seed {seed}, bytes {sizes}")


if __name__ == "__main__":
    main()
