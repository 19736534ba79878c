"""Mistakes one can make in a transformer, each as a change of config.json or of a model that transformers has loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from golden_models import Config, follows_length, has_normed_heads, is_sparse
from golden_oracle import router_of
from torch import Tensor, nn


def network(layer: Any) -> Any:
    """A layer's feed-forward network, dense or a mixture."""
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


@dataclass(frozen=True)
class Subject:
    """A loaded model, about to be spoilt."""

    model: Any
    config: Config
    undo: ExitStack

    @property
    def attentions(self) -> list[Any]:
        """Attention modules of all layers."""
        return [layer.self_attn for layer in self.model.model.layers]

    @property
    def dense(self) -> list[Any]:
        """Dense feed-forward modules."""
        return [network(layer) for layer in self.model.model.layers if router_of(layer) is None]

    @property
    def sparse(self) -> list[Any]:
        """Mixture-of-experts modules."""
        return [network(layer) for layer in self.model.model.layers if router_of(layer) is not None]

    @property
    def routers(self) -> list[Any]:
        """Routers of all mixtures."""
        return [router for router in map(router_of, self.model.model.layers) if router is not None]

    @property
    def rotary(self) -> Any:
        """Rotary module that the call at hand uses."""
        return self.model.model.rotary_emb

    def norms(self, name: str) -> list[Any]:
        """Norms by the name they have in a layer, in its attention, or at the end."""
        holders = [self.model.model] if name == "norm" else self.attentions if name in ("q_norm", "k_norm") else self.model.model.layers
        return [getattr(holder, name) for holder in holders]

    def replace(self, name: str, wrong: Callable[[Any], Any]) -> None:
        """Put ``wrong(right)`` in the place of a function of the family's module."""
        module = sys.modules[type(self.model).__module__]
        self.undo.enter_context(mock.patch.object(module, name, wrong(getattr(module, name))))


@dataclass(frozen=True)
class Mistake:
    """One thing done wrong."""

    name: str
    applies: Callable[[Config], bool]
    changes: Callable[[Config], Config]
    """What config.json would have to say."""
    spoil: Callable[[Subject], None]


MISTAKES: list[Mistake] = []
"""In the order of the table."""


def always(_: Config) -> bool:
    """Every file."""
    return True


def misread(name: str, applies: Callable[[Config], bool], changes: Callable[[Config], Config]) -> None:
    """Add a mistake that amounts to another config.json."""
    MISTAKES.append(Mistake(name, applies, changes, lambda subject: None))


def mistake(name: str, applies: Callable[[Config], bool] = always) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a mistake that is made in a loaded model."""

    def add(spoil: Callable[[Subject], None]) -> Callable[[Subject], None]:
        MISTAKES.append(Mistake(name, applies, lambda config: {}, spoil))
        return spoil

    return add


def is_gemma(config: Config) -> bool:
    """Whether weights of norms mean ``1 + w`` and the halves of a layer are normalised before and after."""
    return bool(config["model_type"].startswith("gemma"))


# ---- rotary embedding


def scaling(config: Config) -> Config:
    """The file's `rope_scaling`, empty without one."""
    return config.get("rope_scaling") or {}


def is_scaled(config: Config) -> bool:
    """Whether rotary frequencies are scaled."""
    return bool(scaling(config))


def has_attention_factor(config: Config) -> bool:
    """Whether cosine and sine have a factor."""
    return scaling(config).get("rope_type") in ("yarn", "longrope")


def has_options(config: Config) -> bool:
    """Whether YaRN's options differ from their defaults."""
    return "beta_fast" in scaling(config)


def rescaled(**changes: Any) -> Callable[[Config], Config]:
    """Another `rope_scaling`; None removes an entry."""
    return lambda config: {"rope_scaling": {k: v for k, v in (scaling(config) | changes).items() if v is not None}}


def rotate_every_two(x: Tensor) -> Tensor:
    """Quarter turn of neighbouring elements."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@mistake("rotary: neighbours are the pairs, not halves")
def _(subject: Subject) -> None:
    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c, s = (x[:, None, :, : x.shape[-1] // 2].repeat_interleave(2, -1) for x in (cos, sin))
        return q * c + rotate_every_two(q) * s, k * c + rotate_every_two(k) * s

    subject.replace("apply_rotary_pos_emb", lambda right: wrong)


@mistake("rotary: turned the other way")
def _(subject: Subject) -> None:
    subject.replace("apply_rotary_pos_emb", lambda right: lambda q, k, cos, sin: right(q, k, cos, -sin))


@mistake("rotary: query one position ahead of the keys")
def _(subject: Subject) -> None:
    def wrap(right: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            rotary = subject.rotary
            frequencies = rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq
            step = frequencies.repeat(2)[None, None]
            ahead, _ = right(q, q, step.cos(), step.sin())
            return right(ahead, k, cos, sin)

        return wrong

    subject.replace("apply_rotary_pos_emb", wrap)


misread("rotary: base 10000 whatever `rope_theta` says", always, lambda config: {"rope_theta": 1e4})
misread("rotary: scaling ignored", is_scaled, lambda config: {"rope_scaling": None})
misread("rotary: every frequency divided by `factor`", lambda c: is_scaled(c) and scaling(c)["rope_type"] != "linear",
        lambda config: {"rope_scaling": {"rope_type": "linear", "factor": scaling(config)["factor"]}})  # fmt: skip


@mistake("rotary: attention factor ignored", has_attention_factor)
def _(subject: Subject) -> None:
    subject.rotary.attention_scaling = 1.0


misread("rotary: `beta_fast` and `beta_slow` ignored", has_options, rescaled(beta_fast=None, beta_slow=None))
misread("rotary: `truncate` ignored", has_options, rescaled(truncate=None))
misread("rotary: `mscale` and `mscale_all_dim` ignored", has_options, rescaled(mscale=None, mscale_all_dim=None))
misread("rotary: no frequencies between `low_freq_factor` and `high_freq_factor`", lambda c: "low_freq_factor" in scaling(c),
        lambda c: rescaled(high_freq_factor=scaling(c)["low_freq_factor"] * (1 + 1e-9))(c))  # fmt: skip


@mistake("rotary: always as in the original context", follows_length)
def _(subject: Subject) -> None:
    subject.rotary.rope_type = "default"


def by_another_length(subject: Subject, longer: Callable[[], Tensor]) -> None:
    """Take frequencies of a longer sequence."""
    kind = subject.rotary.rope_type

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.forward(*args, position_ids=kwargs["position_ids"] + longer())
        module.rope_type = "default"

    def after(module: Any, args: tuple[Any, ...], out: Any) -> None:
        module.rope_type = kind

    subject.rotary.register_forward_pre_hook(before, with_kwargs=True)
    subject.rotary.register_forward_hook(after)


@mistake("rotary: length one too long", follows_length)
def _(subject: Subject) -> None:
    by_another_length(subject, lambda: torch.tensor(1))


@mistake("rotary: length counts padding", follows_length)
def _(subject: Subject) -> None:
    padding = [torch.tensor(0)]

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]  # generate() leaves it out where nothing is padded
        padding[0] = torch.tensor(0) if mask is None else (1 - mask).sum(-1, keepdim=True)

    subject.model.model.register_forward_pre_hook(remember, with_kwargs=True)
    by_another_length(subject, lambda: padding[0])


@mistake("rotary: keys in the cache turned anew as the length grows", follows_length)
def _(subject: Subject) -> None:
    subject.model.generation_config.use_cache = False


# ---- attention


def window_of(config: Config) -> int | None:
    """Sliding window of the layers that have one."""
    return config.get("sliding_window")


def has_window(config: Config) -> bool:
    """Whether any layer has a sliding window."""
    return window_of(config) is not None


def window_in_some(config: Config) -> bool:
    """Whether some layers have the window and others do not."""
    return has_window(config) and (config["model_type"] == "qwen3" or is_gemma(config))


def exchanged_windows(config: Config) -> Config:
    """The window where there was none, and none where it was."""
    kinds = ["full_attention", "sliding_attention"]
    first, n = config.get("max_window_layers", 0), config["num_hidden_layers"]
    types = config.get("layer_types") or [kinds[(i + 1) % 2 if is_gemma(config) else i >= first] for i in range(n)]
    return {"layer_types": [kinds[t == kinds[0]] for t in types]}


def without_window(config: Config) -> Config:
    """No layer has a window."""
    n = config["num_hidden_layers"]
    if is_gemma(config):
        return {"layer_types": ["full_attention"] * n, "rope_local_base_freq": config.get("rope_theta")}
    return {"sliding_window": None, "use_sliding_window": False, "layer_types": None}


def window_everywhere(config: Config) -> Config:
    """Every layer has it."""
    if is_gemma(config):
        return {"layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    return {"layer_types": None, "max_window_layers": 0}


misread("attention: window ignored", has_window, without_window)
misread("attention: window one longer", has_window, lambda config: {"sliding_window": config["sliding_window"] + 1})
misread("attention: window one shorter", has_window, lambda config: {"sliding_window": config["sliding_window"] - 1})
misread("attention: window in every layer", window_in_some, window_everywhere)
misread("attention: window in the other layers", window_in_some, exchanged_windows)


def masked_by(subject: Subject, visible: Callable[[Tensor, int | None], Tensor]) -> None:
    """Replace what queries see by `visible` of the right answer and the window: (..., queries, keys) bool, both up to the last token."""

    def wrap(right: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
            seen = visible(attention_mask == 0, kwargs.get("sliding_window"))
            lowest = torch.finfo(q.dtype).min
            return right(module, q, k, v, torch.where(seen, 0.0, lowest), **kwargs)

        return wrong

    subject.replace("eager_attention_forward", wrap)


@mistake("attention: next token seen too")
def _(subject: Subject) -> None:
    def visible(right: Tensor, window: int | None) -> Tensor:
        n = right.shape[-2]
        if n != right.shape[-1]:  # a step with a cache has no next token
            return right
        there = torch.diagonal(right, dim1=-2, dim2=-1)  # every token but padding sees itself
        return right | (torch.eye(n, dtype=torch.bool).roll(1, -1).triu(1) & there[..., None, :])

    masked_by(subject, visible)


@mistake("attention: own token not seen")
def _(subject: Subject) -> None:
    def visible(right: Tensor, window: int | None) -> Tensor:
        own = torch.ones_like(right[0, 0]).triu(right.shape[-1] - right.shape[-2])
        return torch.where(right.sum(-1, keepdim=True) > 1, right & ~own, right)

    masked_by(subject, visible)


@mistake("attention: padding seen")
def _(subject: Subject) -> None:
    def visible(right: Tensor, window: int | None) -> Tensor:
        last = right.shape[-1] - right.shape[-2]
        seen = torch.ones_like(right).tril(last)
        return seen if window is None else seen.triu(last - window + 1)

    masked_by(subject, visible)


@mistake("attention: key heads repeated in turn, not one after another")
def _(subject: Subject) -> None:
    subject.replace("repeat_kv", lambda right: lambda x, n: x.repeat(1, n, 1, 1))


@mistake("attention: scores not scaled")
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.scaling = 1.0


@mistake("attention: scores scaled by hidden size / heads", lambda c: c["hidden_size"] != c["num_attention_heads"] * c["head_dim"])
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.scaling = (subject.config["hidden_size"] / subject.config["num_attention_heads"]) ** -0.5


# ---- norms


def not_gemma(config: Config) -> bool:
    """Every other family."""
    return not is_gemma(config)


def normed_by_head(config: Config) -> bool:
    """Whether every head is normalised by itself."""
    return has_normed_heads(config) and config["model_type"] != "olmoe"


NORMS: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "input_layernorm": ("before attention", always),
    "post_attention_layernorm": ("before the feed-forward network", not_gemma),
    "pre_feedforward_layernorm": ("before the feed-forward network", is_gemma),
    "norm": ("before the head", always),
    "q_norm": ("of queries", has_normed_heads),
    "k_norm": ("of keys", has_normed_heads),
}


def without_epsilon(norm: Any) -> None:
    """Take a norm's epsilon away."""
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.0)


def epsilon(norm: Any) -> float:
    """Read a norm's epsilon."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _norm_mistakes(name: str, where: str, applies: Callable[[Config], bool]) -> None:
    @mistake(f"norm {where}: weight ignored", applies)
    def _(subject: Subject) -> None:
        for norm in subject.norms(name):
            norm.weight.fill_(0.0 if is_gemma(subject.config) else 1.0)

    @mistake(f"norm {where}: epsilon ignored", applies)
    def _(subject: Subject) -> None:
        for norm in subject.norms(name):
            without_epsilon(norm)


for _name, (_where, _applies) in NORMS.items():
    _norm_mistakes(_name, _where, _applies)


AFTER_NORMS = {"post_attention_layernorm": "after attention", "post_feedforward_layernorm": "after the feed-forward network"}
for _name, _where in AFTER_NORMS.items():
    _norm_mistakes(_name, _where, is_gemma)

    @mistake(f"norm {_where}: left out", is_gemma)
    def _(subject: Subject, name: str = _name) -> None:
        for layer in subject.model.model.layers:
            setattr(layer, name, nn.Identity())


@mistake("norms: weight ``w`` in place of ``1 + w``", is_gemma)
def _(subject: Subject) -> None:
    for module in subject.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.sub_(1.0)


def every_norm(subject: Subject, forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Give every norm another formula."""
    offset = 1.0 if is_gemma(subject.config) else 0.0
    for name in [n for n, (_, applies) in NORMS.items() if applies(subject.config)] + list(AFTER_NORMS) * is_gemma(subject.config):
        for norm in subject.norms(name):
            norm.forward = lambda x, norm=norm: (offset + norm.weight) * forward(norm, x)


@mistake("norms: epsilon outside the root")
def _(subject: Subject) -> None:
    every_norm(subject, lambda norm, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + epsilon(norm)))


@mistake("norms: mean subtracted")
def _(subject: Subject) -> None:
    def forward(norm: Any, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon(norm))

    every_norm(subject, forward)


@mistake("norms of queries and keys: left out", has_normed_heads)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()


@mistake("norms of queries and keys: weights exchanged", normed_by_head)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.q_norm, attention.k_norm = attention.k_norm, attention.q_norm


@mistake("norms of queries and keys: over all heads together", normed_by_head)
def _(subject: Subject) -> None:
    def joint(norm: Any, x: Tensor) -> Tensor:
        weight = norm.weight + (1.0 if is_gemma(subject.config) else 0.0)
        return weight * x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + epsilon(norm))

    for norm in [*subject.norms("q_norm"), *subject.norms("k_norm")]:
        norm.forward = lambda x, norm=norm: joint(norm, x)


@mistake("norms of queries and keys: after the rotation", normed_by_head)
def _(subject: Subject) -> None:
    now: list[Any] = []
    for attention in subject.attentions:
        norms = attention.q_norm, attention.k_norm
        attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
        attention.register_forward_pre_hook(lambda _m, _a, norms=norms: now.__setitem__(slice(None), norms))

    def wrap(right: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def wrong(*args: Tensor) -> tuple[Tensor, Tensor]:
            q, k = right(*args)
            return now[0](q), now[1](k)

        return wrong

    subject.replace("apply_rotary_pos_emb", wrap)


@mistake("norms of queries and keys: every head by itself", lambda c: c["model_type"] == "olmoe")
def _(subject: Subject) -> None:
    d = subject.config["head_dim"]

    def forward(norm: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, d))
        return norm.weight * (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + epsilon(norm))).flatten(-2)

    for norm in [*subject.norms("q_norm"), *subject.norms("k_norm")]:
        norm.forward = lambda x, norm=norm: forward(norm, x)


# ---- biases, limits, constant factors


def biased(config: Config) -> bool:
    """Whether queries, keys and values have biases."""
    return config["model_type"] == "qwen2_moe"


for _which in ("q", "k", "v"):

    @mistake(f"bias of {_which}: ignored", biased)
    def _(subject: Subject, which: str = _which) -> None:
        for attention in subject.attentions:
            getattr(attention, which + "_proj").bias.zero_()


def clipped(config: Config) -> bool:
    """Whether queries, keys and values are held within a limit."""
    return bool(config.get("clip_qkv"))


misread("clip: ignored", clipped, lambda config: {"clip_qkv": None})


@mistake("clip: before the norms of queries and keys", clipped)
def _(subject: Subject) -> None:
    limit = subject.config["clip_qkv"]
    for attention in subject.attentions:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.register_forward_hook(lambda _m, _a, out: out.clamp(-limit, limit))
        attention.config.clip_qkv = None


def scaled_by(field: str) -> Callable[[Config], bool]:
    """Whether a factor is there."""
    return lambda config: bool(config.get(field))


for _field in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
    misread(f"scales: `{_field}` ignored", scaled_by(_field), lambda config, field=_field: {field: 1.0})


misread("scales: scores by the head's size, not by `query_pre_attn_scalar`", is_gemma, lambda c: {"query_pre_attn_scalar": c["head_dim"]})
misread("head: soft cap ignored", scaled_by("final_logit_softcapping"), lambda config: {"final_logit_softcapping": None})


@mistake("scales: embedding not multiplied", is_gemma)
def _(subject: Subject) -> None:
    root = subject.config["hidden_size"] ** 0.5
    first = subject.model.model.layers[0]
    first.register_forward_pre_hook(lambda _m, args: (args[0] / root, *args[1:]))


misread("rotary: layers with a window turn as the others", scaled_by("rope_local_base_freq"),
        lambda c: {"rope_local_base_freq": c["rope_theta"]})  # fmt: skip
misread("rotary: every layer turns as those with a window", scaled_by("rope_local_base_freq"),
        lambda c: {"rope_theta": c["rope_local_base_freq"]})  # fmt: skip


# ---- shared experts


def shares(config: Config) -> bool:
    """Whether there are shared experts."""
    return "shared_expert_intermediate_size" in config


@mistake("shared experts: left out", shares)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.shared_expert.down_proj.weight.zero_()


@mistake("shared experts: not gated", shares)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out: torch.full_like(out, float("inf")))


@mistake("shared experts: gate without sigmoid", shares)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out: torch.logit(out.clamp(1e-6, 1 - 1e-6)))


# ---- residual stream and feed-forward networks


def without_residual(source: Any, sink: Any, factor: float) -> None:
    """Take the input of `source` away from the output of `sink`, to which it is about to be added."""
    kept: list[Tensor] = []

    def subtract(module: Any, args: tuple[Any, ...], out: Any) -> Any:
        before = kept[0] / factor
        return out - before if isinstance(out, Tensor) else (out[0] - before, *out[1:])

    source.register_forward_pre_hook(lambda _m, args: kept.__setitem__(slice(None), args[:1]))
    sink.register_forward_hook(subtract)


@mistake("residual around attention dropped")
def _(subject: Subject) -> None:
    for layer in subject.model.model.layers:
        sink = layer.post_attention_layernorm if is_gemma(subject.config) else layer.self_attn
        without_residual(layer.input_layernorm, sink, subject.config.get("residual_multiplier", 1.0))


@mistake("residual around the feed-forward network dropped")
def _(subject: Subject) -> None:
    for layer in subject.model.model.layers:
        gemma = is_gemma(subject.config)
        usual = (layer.post_attention_layernorm, network(layer))
        source, sink = (layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm) if gemma else usual
        without_residual(source, sink, subject.config.get("residual_multiplier", 1.0))


misread("feed-forward: gelu in place of silu", not_gemma, lambda config: {"hidden_act": "gelu"})
misread("feed-forward: silu in place of gelu", is_gemma, lambda config: {"hidden_activation": "silu"})
misread("feed-forward: gelu itself, not its tanh form", is_gemma, lambda config: {"hidden_activation": "gelu"})


def has_dense(config: Config) -> bool:
    """Whether there are dense layers."""
    return not all(is_sparse(config, i) for i in range(config["num_hidden_layers"]))


def has_sparse(config: Config) -> bool:
    """Whether there are mixtures of experts."""
    return any(is_sparse(config, i) for i in range(config["num_hidden_layers"]))


@mistake("feed-forward: gate and up exchanged", has_dense)
def _(subject: Subject) -> None:
    for mlp in subject.dense:
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@mistake("experts: gate and up exchanged", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.experts.gate_up_proj.copy_(mlp.experts.gate_up_proj.roll(mlp.experts.gate_up_proj.shape[1] // 2, 1))


@mistake("experts: order shifted by one", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        for weight in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
            weight.copy_(weight.roll(1, 0))


def normalized(config: Config) -> bool:
    """Whether there are mixtures whose weights are divided by their sum."""
    return has_sparse(config) and config.get("norm_topk_prob", True)


def raw(config: Config) -> bool:
    """Whether there are mixtures whose weights are not divided by their sum."""
    return has_sparse(config) and not config.get("norm_topk_prob", True)


def weigh(subject: Subject, weights: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let routers weigh the chosen experts by `weights` of their logits, (tokens, experts), and choices, (tokens, k)."""
    for router in subject.routers:
        router.register_forward_hook(lambda _m, _a, out: (out[0], weights(out[0], out[2]), out[2]))


@mistake("experts: weights not divided by their sum", normalized)
def _(subject: Subject) -> None:
    weigh(subject, lambda logits, ids: logits.softmax(-1).gather(-1, ids))


@mistake("experts: weights divided by their sum (softmax after the choice)", raw)
def _(subject: Subject) -> None:
    weigh(subject, lambda logits, ids: logits.gather(-1, ids).softmax(-1))


@mistake("experts: sigmoid in place of softmax", has_sparse)
def _(subject: Subject) -> None:
    def weights(logits: Tensor, ids: Tensor) -> Tensor:
        chosen = logits.sigmoid().gather(-1, ids)
        return chosen / chosen.sum(-1, keepdim=True) if normalized(subject.config) else chosen

    weigh(subject, weights)


@mistake("experts: weights in the opposite order", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.experts.register_forward_pre_hook(lambda _m, args: (*args[:2], args[2].flip(-1)))


@mistake("experts: weight on the input, not on the output", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:

        def forward(x: Tensor, ids: Tensor, weights: Tensor, right: Callable[..., Tensor] = mlp.experts.forward) -> Tensor:
            slots = [(ids[:, [i]], weights[:, [i]]) for i in range(ids.shape[1])]
            return sum((right(x * w, i, torch.ones_like(w)) for i, w in slots), torch.zeros_like(x))

        mlp.experts.forward = forward


@mistake("experts: chosen before the norm", has_sparse)
def _(subject: Subject) -> None:
    for layer in subject.model.model.layers:
        router = router_of(layer)
        if router is not None:
            kept: list[Tensor] = []
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args, kept=kept: kept.__setitem__(slice(None), args))
            router.register_forward_pre_hook(lambda _m, args, kept=kept: (kept[0].view(-1, kept[0].shape[-1]),))


@mistake("dense and sparse networks exchanged between layers", lambda c: has_sparse(c) and has_dense(c))
def _(subject: Subject) -> None:
    layers = subject.model.model.layers
    sparse = next(layer for layer in layers if router_of(layer) is not None)
    dense = next(layer for layer in layers if router_of(layer) is None)
    sparse.mlp, dense.mlp = dense.mlp, sparse.mlp


# ---- head


@mistake("head: the embedding in place of its own matrix", lambda config: not config["tie_word_embeddings"])
def _(subject: Subject) -> None:
    subject.model.lm_head.weight.copy_(subject.model.model.embed_tokens.weight)


@mistake("head: a matrix of its own in place of the embedding", lambda config: config["tie_word_embeddings"])
def _(subject: Subject) -> None:
    embedding = subject.model.model.embed_tokens.weight
    noise = np.random.default_rng(list(b"head")).standard_normal(tuple(embedding.shape))
    subject.model.lm_head.weight = nn.Parameter(torch.from_numpy(noise).float() * embedding.std())
