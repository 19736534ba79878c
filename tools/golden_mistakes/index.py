"""Mistakes in the lightning indexer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from golden_models import Config, chooses_keys
from torch import Tensor, nn

from golden_mistakes.subject import Subject, misread, mistake


def indexers(subject: Subject) -> list[Any]:
    """Indexers of all layers that have one."""
    return [attention.indexer for attention in subject.attentions if getattr(attention, "indexer", None) is not None]


def shares_keys(config: Config) -> bool:
    """Whether some layers attend to what the layer before them chose."""
    return "shared" in config.get("indexer_types", ())


misread("indexer: every key taken", chooses_keys, lambda config: {"index_topk": 1000})
misread("indexer: one key more", chooses_keys, lambda config: {"index_topk": config["index_topk"] + 1})
misread("indexer: one key less", chooses_keys, lambda config: {"index_topk": config["index_topk"] - 1})


@mistake("indexer: the newest keys taken", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):

        def newest(_m: Any, _a: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
            mask = kwargs["attention_mask"] if "attention_mask" in kwargs else _a[3]
            place = torch.arange(mask.shape[-1]).expand(mask.shape).masked_fill(mask < -1e30, -1)
            return place.topk(out.shape[-1], -1).indices.to(out.dtype)

        one.register_forward_hook(newest, with_kwargs=True)


@mistake("indexer: relu left out", chooses_keys)
def _(subject: Subject) -> None:
    subject.undo.enter_context(mock.patch.object(torch.nn.functional, "relu", lambda x: x))


@mistake("indexer: sizes of the products in place of relu", chooses_keys)
def _(subject: Subject) -> None:
    subject.undo.enter_context(mock.patch.object(torch.nn.functional, "relu", torch.abs))


@mistake("indexer: weights of heads ignored", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):
        one.weights_proj.register_forward_hook(lambda _m, _a, out: torch.ones_like(out))


@mistake("indexer: one head's weight for the next", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):
        one.weights_proj.weight.copy_(one.weights_proj.weight.roll(1, 0))


@mistake("indexer: key not normalised", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):
        one.k_norm = nn.Identity()


@mistake("indexer: mean of the key not subtracted", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):
        norm = one.k_norm
        norm.forward = lambda x, norm=norm: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


for _name, _value in (("weight", 1.0), ("bias", 0.0)):

    @mistake(f"indexer: {_name} of the key's norm ignored", chooses_keys)
    def _(subject: Subject, name: str = _name, value: float = _value) -> None:
        for one in indexers(subject):
            getattr(one.k_norm, name).fill_(value)


@mistake("indexer: `rms_norm_eps` as the norm's epsilon", chooses_keys)
def _(subject: Subject) -> None:
    for one in indexers(subject):
        one.k_norm.eps = subject.config["rms_norm_eps"]


def turned_otherwise(subject: Subject, wrong: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Turn indexers' queries and keys, and nothing else, by another function of them, cosines and sines."""
    module = sys.modules[type(subject.model).__module__]
    name = "apply_rotary_pos_emb" if hasattr(module, "apply_rotary_pos_emb") else "apply_rotary_pos_emb_interleave"

    def wrap(right: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return wrong(*args) if kwargs.get("unsqueeze_dim") == 2 else right(*args, **kwargs)

        return call

    subject.replace(name, wrap)


@mistake("indexer: not rotated", chooses_keys)
def _(subject: Subject) -> None:
    turned_otherwise(subject, lambda q, k, cos, sin: (q, k))


@mistake("indexer: halves are the pairs where neighbours are, and the reverse", chooses_keys)
def _(subject: Subject) -> None:
    halves = subject.config["model_type"] == "glm_moe_dsa"

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
        return first, second

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = pairs(x)
        c, s = (f[..., : a.shape[-1]].unsqueeze(2) for f in (cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    turned_otherwise(subject, lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin)))


@mistake("indexer: the last elements rotated, not the first", chooses_keys)
def _(subject: Subject) -> None:
    part = subject.config["qk_rope_head_dim"]
    for one in indexers(subject):
        n = one.n_heads
        one.wq_b.weight.copy_(one.wq_b.weight.unflatten(0, (n, -1)).roll(part, 1).flatten(0, 1))
        for parameter in (one.wk.weight, one.k_norm.weight, one.k_norm.bias):
            parameter.copy_(parameter.roll(part, 0))


@mistake("indexer: layers that share keys see every one", shares_keys)
def _(subject: Subject) -> None:
    def every(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        kwargs["prev_topk_indices"] = torch.arange(mask.shape[-1]).expand(mask.shape[0], mask.shape[2], -1).contiguous()
        return args, kwargs

    for attention in subject.attentions:
        if attention.indexer is None:
            attention.register_forward_pre_hook(every, with_kwargs=True)
