"""What transformers computes from a checkpoint in float32: the oracle of the golden files and of the live comparison."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

ROUTER_MARGIN = 5e-4
"""Least distance of neighbouring router logits, down to the first expert that is not chosen, where experts are chosen by logits."""
SCORE_MARGIN = 1e-4
"""The same where they are chosen by a score between 0 and 1 and a correction bias; also of groups' scores, down to the first closed one."""
TOKEN_MARGIN = 2e-3
"""Least lead of a greedy token, in standard deviations of the logits."""


INDEX_MARGIN = 2e-5
"""Least distance of the lowest score of a key that an indexer takes to the highest of one that it does not, in standard deviations."""
EXPERTS = ("mixtral", "dots1", "minimax_m2", "gpt_oss", "phimoe", "deepseek_v2", "deepseek_v3", "deepseek_v32")
"""Families with experts whose names do not say so."""


class TooCloseError(Exception):
    """An answer hangs by less than the margin; another seed is needed."""


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """One answer: b sequences of t tokens, n new ones. Values of padding mean nothing."""

    logits: Tensor
    """(b, t, vocab)."""
    hidden: Tensor
    """(layers + 1, b, t, hidden): the embedding's output, then what each layer adds up to, the last one *before* the final norm."""
    router_logits: Tensor | None
    """(layers with a mixture, b, t, experts); None without mixtures, as are the next two."""
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    """(layers with a mixture, b, t, k), as the router hands them to the experts, the highest score first."""
    generated: Tensor
    """(b, t + n), greedy, prompt included."""
    router_margin: float
    index_margin: float
    token_margin: float
    """Over prompt and new tokens: least distance of scores in units of `ROUTER_MARGIN` or `SCORE_MARGIN`, and of indexers' in units of
    `INDEX_MARGIN`, infinite without them; what `TOKEN_MARGIN` bounds."""

    def check_margins(self) -> None:
        """Raise TooCloseError if an expert or a token is chosen by less than the margin."""
        if min(self.router_margin, self.index_margin) < 1 or self.token_margin < TOKEN_MARGIN:
            margins = f"router margin {self.router_margin:.1e}, index margin {self.index_margin:.1e}"
            raise TooCloseError(f"{margins}, token margin {self.token_margin:.1e}")


@torch.no_grad()
def load(directory: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """Load a checkpoint in float32 with plain attention and experts; refuse one that transformers would complete with random weights.

    `changes` are made to config.json first. MXFP4 and FP8 are made plain first, by transformers' own conversion.
    """
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in written:
        with tempfile.TemporaryDirectory() as plain:
            _made_plain(directory, Path(plain), written)
            return load(Path(plain), changes)
    config = CONFIG_MAPPING[written["model_type"]].from_dict(written | dict(changes or {}))
    options = {"experts_implementation": "eager"} if "moe" in config.model_type or config.model_type in EXPERTS else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    wrong = {key: value for key, value in info.items() if value and key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong:
        raise SystemExit(f"{directory}: transformers does not load the checkpoint completely: {wrong}")
    return _named_as_usual(model.eval())


def _named_as_usual(model: Any) -> Any:
    """Modules of DBRX and Llama 4 under a Llama's names as well; their routers give logits, weights and choices, as all others do."""
    if model.config.model_type == "llama4_text":
        for layer in model.model.layers:
            alias(layer, mlp=layer.feed_forward)
            if layer.is_moe_layer:
                _llama4_mixture(layer.feed_forward)
        return model
    if model.config.model_type != "dbrx":
        return model
    body = model.transformer
    alias(model, model=body)
    alias(body, layers=body.blocks, embed_tokens=body.wte, norm=body.norm_f)
    for block in body.blocks:
        half, mixture = block.norm_attn_norm, block.ffn
        alias(block, self_attn=half.attn, mlp=mixture, input_layernorm=half.norm_1, post_attention_layernorm=half.norm_2)

        def forward(x: Tensor, right: Any = mixture.router.forward, route: Any = mixture.route_tokens_to_experts) -> tuple[Tensor, ...]:
            logits = right(x)
            return logits, *route(logits)

        mixture.router.forward = forward
        mixture.route_tokens_to_experts = lambda decided: decided[1:]
    return model


def alias(module: Any, **names: Any) -> None:
    """Give modules other names, without making them submodules twice."""
    for name, value in names.items():
        object.__setattr__(module, name, value)


def _llama4_mixture(mixture: Any) -> None:
    """Let transformers' own mixture go by a router that gives logits, weights and choices."""
    scored, mixed = mixture.router.forward, type(mixture).forward

    def route(x: Tensor) -> tuple[Tensor, ...]:
        scores, logits = scored(x)
        ids = logits.topk(mixture.top_k, -1).indices
        return logits, scores.gather(-1, ids), ids

    def forward(x: Tensor) -> Any:
        logits, weights, ids = mixture.router(x.reshape(-1, x.shape[-1]))
        scores = torch.zeros_like(logits).scatter(-1, ids, weights)
        parts = {name: getattr(mixture, name) for name in ("hidden_dim", "experts", "shared_expert")}
        return mixed(SimpleNamespace(router=lambda _: (scores, logits), **parts), x)

    mixture.router.forward, mixture.forward = route, forward


def _made_plain(directory: Path, plain: Path, written: dict[str, Any]) -> None:
    """Write the same checkpoint without MXFP4 or FP8."""
    tensors = load_file(directory / "model.safetensors")
    for name in [n.removesuffix("_scale_inv") for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = Fp8Dequantize(None)._dequantize_one(tensors.pop(name), tensors.pop(name + "_scale_inv"), torch.float32)
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        tensors[name] = convert_moe_packed_tensors(tensors.pop(name + "_blocks"), tensors.pop(name + "_scales"))
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != "quantization_config"}), encoding="utf-8")


@torch.no_grad()
def consult(model: Any, ids: Tensor, mask: Tensor, *, new_tokens: int) -> Oracle:
    """Run the model on (b, t) ids, padded on the left; positions count real tokens only.

    Where rotary frequencies follow the length (``dynamic``, ``longrope``), transformers goes by the longest sequence of the batch, and the
    module keeps what an earlier call left in it. Here every call finds the module as it was loaded; sequences should be equally long.
    """
    (b, t), real = ids.shape, mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with _fresh_rotary(model), _watched(model) as prompt:
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with _fresh_rotary(model), _watched(model) as steps:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    layers, n_moe = len(model.model.layers), len(prompt.routers)
    decided = [_sorted(model, i, *router) for i, router in enumerate(prompt.routers)]
    shaped = [[r.view(b, t, -1) for r in router] for router in decided]
    router_logits, weights, chosen = (torch.stack(r) for r in zip(*shaped, strict=True)) if n_moe else (None, None, None)
    margin = float("inf")
    if n_moe:
        # The first pass of `steps` is the prompt again, with its padding.
        known = [(i, layer[real]) for i, layer in enumerate(router_logits)]
        known += [(i % n_moe, router[0]) for i, router in enumerate(steps.routers) if i >= n_moe]
        margin = min(_margin(model, i, logits, chosen.shape[-1]) for i, logits in known)
    two = torch.stack(out.logits).topk(2, -1).values
    return Oracle(
        logits=logits,
        hidden=torch.stack([*prompt.embeddings, *(x if isinstance(x, Tensor) else x[0] for x in prompt.layers[:layers])]),
        router_logits=router_logits,
        topk_ids=chosen,
        topk_weights=weights,
        generated=out.sequences,
        router_margin=margin,
        index_margin=min([_index_margin(*call) for call in (*prompt.indexers, *steps.indexers)], default=float("inf")),
        token_margin=float((two[..., 0] - two[..., 1]).min() / logits[real].std()),
    )


def _least_gap(router: Tensor, k: int) -> float:
    """Smallest distance of neighbouring scores of (n, experts), from the first to the one after the k-th; minus infinity is none."""
    best = router.sort(-1, descending=True).values[:, : k + 1]
    return float((best[:, :-1] - best[:, 1:]).min()) if best.shape[1] > 1 else float("inf")


def _edge_gap(logits: Tensor, noise: float) -> float:
    """Least distance of an expert of (n, experts) from the edge of the band in which sparsemixer counts it, for either choice."""
    gaps, left = [], logits
    for _ in range(2):
        best, chosen = left.max(-1, keepdim=True)
        distance = ((best - logits) / torch.maximum(logits.abs(), best) - 2 * noise).abs()
        gaps.append(float(distance[left > float("-inf")].min()))
        left = left.scatter(-1, chosen, float("-inf"))
    return min(gaps)


def compared(block: Any, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a mixture compares, of logits (n, experts): scores of experts, those of closed groups minus infinity, and scores of groups."""
    router = router_of_block(block)
    holder = next((h for h in (router, block, getattr(router, "moe_statics", None)) if hasattr(h, "e_score_correction_bias")), None)
    if holder is None and getattr(router, "topk_method", "greedy") == "greedy":
        return logits, None
    if holder is None:  # DeepSeek V2: a group's best expert speaks for it
        groups = logits.unflatten(-1, (router.num_group, -1)).amax(-1)
        return _of_open_groups(logits, groups, router.topk_group), groups
    by_softmax = hasattr(router, "moe_statics")
    scores = (logits.softmax(-1) if by_softmax else logits.sigmoid()) + holder.e_score_correction_bias.view(-1)
    n_group = getattr(router, "num_group", 1)
    if n_group == 1:
        return scores, None
    groups = scores.unflatten(-1, (n_group, -1)).topk(2, -1).values.sum(-1)
    return _of_open_groups(scores, groups, router.topk_group), groups


def _of_open_groups(scores: Tensor, groups: Tensor, n_open: int) -> Tensor:
    """Scores (n, experts), minus infinity in all but the `n_open` groups of the highest score."""
    is_open = torch.zeros_like(groups).scatter(-1, groups.topk(n_open, -1).indices, 1.0).bool()
    return scores.unflatten(-1, (groups.shape[-1], -1)).masked_fill(~is_open[..., None], float("-inf")).flatten(-2)


def _sorted(model: Any, index: int, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's answer with each token's experts by descending score."""
    scores, _ = compared(_blocks(model)[index], logits)
    order = scores.gather(-1, ids).argsort(dim=-1, descending=True, stable=True)
    return logits, weights.gather(-1, order), ids.gather(-1, order)


def _margin(model: Any, index: int, logits: Tensor, k: int) -> float:
    """Least distance of neighbouring scores of (n, experts) logits, in units of what is asked for."""
    block = _blocks(model)[index]
    scores, groups = compared(block, logits)
    margin = _least_gap(scores, k) / (ROUTER_MARGIN if scores is logits else SCORE_MARGIN)
    noise = getattr(router_of_block(block), "router_jitter_noise", 0.0)
    if noise > 0:
        margin = min(margin, _edge_gap(logits, noise) / ROUTER_MARGIN)
    return margin if groups is None else min(margin, _least_gap(groups, router_of_block(block).topk_group) / SCORE_MARGIN)


def _blocks(model: Any) -> list[Any]:
    """Mixtures of a model."""
    return [network(layer) for layer in model.model.layers if router_of(layer) is not None]


@dataclass(frozen=True)
class _Watched:
    """What modules gave, in the order of calls."""

    embeddings: list[Tensor] = field(default_factory=list)
    layers: list[Tensor] = field(default_factory=list)
    routers: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Logits, weights and choices, (tokens, ...) each."""
    indexers: list[tuple[Tensor, int]] = field(default_factory=list)
    """Scores that an indexer compared, (b, tokens, keys), and how many it took."""


class _TopkWatch(TorchFunctionMode):
    """Notes what is compared while an indexer runs."""

    def __init__(self, calls: list[tuple[Tensor, int]]) -> None:
        super().__init__()
        self.calls, self.inside = calls, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside and function is Tensor.topk and args[0].is_floating_point():
            self.calls.append((args[0].detach(), args[1]))
        return function(*args, **(kwargs or {}))


def _index_margin(scores: Tensor, k: int) -> float:
    """Least distance of the k-th score of (b, tokens, keys) from the next, of those that are admitted, in units of what is asked for."""
    admitted = scores > -1e30
    if scores.shape[-1] <= k:
        return float("inf")
    best = scores.masked_fill(~admitted, float("-inf")).sort(-1, descending=True).values
    more = admitted.sum(-1) > k
    if not more.any():
        return float("inf")
    return float((best[..., k - 1] - best[..., k])[more].min()) / (INDEX_MARGIN * float(scores[admitted].std()))


def network(layer: Any) -> Any:
    """A layer's feed-forward network, dense or a mixture."""
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def router_of(layer: Any) -> Any:
    """Module that gives a layer's router logits, weights and choices; None in a dense layer."""
    return router_of_block(network(layer))


def router_of_block(block: Any) -> Any:
    """The same of its feed-forward network."""
    for name in ("gate", "router"):
        if hasattr(block, name):
            return getattr(block, name)
    return None


@contextmanager
def _watched(model: Any) -> Iterator[_Watched]:
    seen = _Watched()
    layers = list(model.model.layers)
    places = [(layers, seen.layers), ([router for router in map(router_of, layers) if router is not None], seen.routers)]
    hooks = [m.register_forward_hook(lambda _m, _a, out, into=into: into.append(out)) for modules, into in places for m in modules]
    watch = _TopkWatch(seen.indexers)
    for layer in layers:
        indexer = getattr(layer.self_attn, "indexer", None)
        if indexer is not None:
            hooks.append(indexer.register_forward_pre_hook(lambda _m, _a: setattr(watch, "inside", True)))
            hooks.append(indexer.register_forward_hook(lambda _m, _a, _out: setattr(watch, "inside", False)))
    hooks.append(layers[0].register_forward_pre_hook(lambda _m, args: seen.embeddings.append(args[0])))
    try:
        with watch:
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _fresh_rotary(model: Any) -> Iterator[None]:
    """Work on a copy of the rotary module, which remembers the longest sequence it met."""
    kept = model.model.rotary_emb
    model.model.rotary_emb = copy.deepcopy(kept)
    try:
        yield
    finally:
        model.model.rotary_emb = kept
