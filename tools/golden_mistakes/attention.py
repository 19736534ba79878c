"""Mistakes in which keys a query sees, and in the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_models import Config
from torch import Tensor

from golden_mistakes.subject import Subject, is_gemma, misread, mistake


def has_sinks(config: Config) -> bool:
    """Whether heads have sinks."""
    return bool(config["model_type"] == "gpt_oss")


def window_of(config: Config) -> int | None:
    """Sliding window of the layers that have one."""
    return config.get("sliding_window")


def has_window(config: Config) -> bool:
    """Whether any layer has a sliding window."""
    return window_of(config) is not None


def window_in_some(config: Config) -> bool:
    """Whether some layers have the window and others do not."""
    return has_window(config) and (config["model_type"] in ("qwen3", "dots1", "gpt_oss") or is_gemma(config))


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
    if has_sinks(config):
        return {"layer_types": ["full_attention"] * n}
    return {"sliding_window": None, "use_sliding_window": False, "layer_types": None}


def window_everywhere(config: Config) -> Config:
    """Every layer has it."""
    if is_gemma(config) or has_sinks(config):
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


@mistake("attention: key heads repeated in turn, not one after another", lambda c: c["num_attention_heads"] != c["num_key_value_heads"])
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


@mistake("attention: sinks ignored", has_sinks)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.sinks.fill_(-1e30)


@mistake("attention: sinks scaled as scores are", has_sinks)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.sinks.mul_(attention.scaling)


@mistake("attention: one head's sink for the next", has_sinks)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.sinks.copy_(attention.sinks.roll(1))
