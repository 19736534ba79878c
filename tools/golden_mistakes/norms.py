"""Mistakes in norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_models import Config, has_layer_norm, has_norm_bias, has_normed_heads, normed_over_row
from torch import Tensor, nn

from golden_mistakes.subject import Subject, always, is_gemma, mistake, not_gemma


def normed_by_head(config: Config) -> bool:
    """Whether every head is normalised by itself."""
    return has_normed_heads(config) and not normed_over_row(config)


def rotated_first(config: Config) -> bool:
    """Whether queries and keys are normalised after the rotation."""
    return bool(config["model_type"] == "hunyuan_v1_moe")


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
            added = norm.bias if has_norm_bias(subject.config) else 0.0
            norm.forward = lambda x, norm=norm, added=added: (offset + norm.weight) * forward(norm, x) + added


def without_mean(x: Tensor) -> Tensor:
    """Deviations from the mean."""
    return x - x.mean(-1, keepdim=True)


def scaled(x: Tensor, by: Tensor, norm: Any) -> Tensor:
    """Divide by the root of the mean of squares of `by`."""
    return x * torch.rsqrt(by.pow(2).mean(-1, keepdim=True) + epsilon(norm))


@mistake("norms: epsilon outside the root")
def _(subject: Subject) -> None:
    start = without_mean if has_layer_norm(subject.config) else torch.clone
    every_norm(subject, lambda norm, x: start(x) / (start(x).pow(2).mean(-1, keepdim=True).sqrt() + epsilon(norm)))


@mistake("norms: mean not subtracted", has_layer_norm)
def _(subject: Subject) -> None:
    every_norm(subject, lambda norm, x: scaled(x, x, norm))


@mistake("norms: mean subtracted, but mean of squares in place of the variance", has_layer_norm)
def _(subject: Subject) -> None:
    every_norm(subject, lambda norm, x: scaled(without_mean(x), x, norm))


@mistake("norms: variance of a sample, over n - 1", has_layer_norm)
def _(subject: Subject) -> None:
    every_norm(subject, lambda norm, x: without_mean(x) * torch.rsqrt(x.var(-1, keepdim=True) + epsilon(norm)))


@mistake("norms: biases ignored", has_norm_bias)
def _(subject: Subject) -> None:
    for name in ("input_layernorm", "post_attention_layernorm", "norm"):
        for norm in subject.norms(name):
            norm.bias.zero_()


@mistake("norms: bias before the weight", has_norm_bias)
def _(subject: Subject) -> None:
    for name in ("input_layernorm", "post_attention_layernorm", "norm"):
        for norm in subject.norms(name):
            norm.bias.mul_(norm.weight)


@mistake("norms: mean subtracted", lambda config: not has_layer_norm(config))
def _(subject: Subject) -> None:
    every_norm(subject, lambda norm, x: scaled(without_mean(x), without_mean(x), norm))


@mistake("norms of queries and keys: left out", has_normed_heads)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        subject.take_head_norms(attention)


@mistake("norms of queries and keys: weights exchanged", lambda c: normed_by_head(c) and not rotated_first(c))  # else it is none
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        q, k = (subject.head_norm(attention, name) for name in ("q_norm", "k_norm"))
        q_norm, k_norm = getattr(attention, q), getattr(attention, k)
        setattr(attention, q, k_norm)
        setattr(attention, k, q_norm)


@mistake("norms of queries and keys: over all heads together", normed_by_head)
def _(subject: Subject) -> None:
    axes = (1, 3) if rotated_first(subject.config) else (2, 3)

    def joint(norm: Any, x: Tensor) -> Tensor:
        weight = norm.weight + (1.0 if is_gemma(subject.config) else 0.0)
        return weight * x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + epsilon(norm))

    for norm in [*subject.norms("q_norm"), *subject.norms("k_norm")]:
        norm.forward = lambda x, norm=norm: joint(norm, x)


def around_rotation(subject: Subject, *, after: bool) -> None:
    """Normalise queries and keys right before or after the rotation."""
    now: list[Any] = []
    for attention in subject.attentions:
        norms = subject.take_head_norms(attention)
        attention.register_forward_pre_hook(lambda _m, _a, norms=norms: now.__setitem__(slice(None), norms))

    def wrap(right: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def wrong(q: Tensor, k: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
            if not after:
                return right(now[0](q), now[1](k), *args)
            q, k = right(q, k, *args)
            return now[0](q), now[1](k)

        return wrong

    subject.replace("apply_rotary_pos_emb", wrap)


@mistake("norms of queries and keys: after the rotation", lambda c: normed_by_head(c) and not rotated_first(c))
def _(subject: Subject) -> None:
    around_rotation(subject, after=True)


@mistake("norms of queries and keys: before the rotation", rotated_first)
def _(subject: Subject) -> None:
    around_rotation(subject, after=False)


@mistake("norms of queries and keys: every head by itself", lambda c: has_normed_heads(c) and normed_over_row(c))
def _(subject: Subject) -> None:
    d = subject.config["head_dim"]

    def forward(norm: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, d))
        return norm.weight * (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + epsilon(norm))).flatten(-2)

    for norm in [*subject.norms("q_norm"), *subject.norms("k_norm")]:
        norm.forward = lambda x, norm=norm: forward(norm, x)
