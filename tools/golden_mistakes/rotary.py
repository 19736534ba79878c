"""Mistakes in the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from golden_models import Config, follows_length
from torch import Tensor

from golden_mistakes.subject import Subject, always, misread, mistake


def scaling(config: Config) -> Config:
    """The file's `rope_scaling`, empty without one."""
    return config.get("rope_scaling") or {}


def is_scaled(config: Config) -> bool:
    """Whether rotary frequencies are scaled."""
    return bool(scaling(config))


def has_attention_factor(config: Config) -> bool:
    """Whether cosine and sine have a factor."""
    return scaling(config).get("rope_type") in ("yarn", "longrope") and not has_mscales(config)


def has_mscales(config: Config) -> bool:
    """Whether that factor is given, for the original context and beyond it."""
    return "long_mscale" in scaling(config)


def stretched_alike(config: Config) -> Config:
    """Every frequency divided by one factor."""
    own = {k: v for k, v in scaling(config).items() if has_mscales(config) and not k.endswith("_factor")}
    return {"rope_scaling": own | {"rope_type": "linear", "factor": scaling(config)["factor"]}}


def has_options(config: Config) -> bool:
    """Whether YaRN's options differ from their defaults."""
    return "beta_fast" in scaling(config)


def rescaled(**changes: Any) -> Callable[[Config], Config]:
    """Another `rope_scaling`; None removes an entry."""
    return lambda config: {"rope_scaling": {k: v for k, v in (scaling(config) | changes).items() if v is not None}}


def rotate_every_two(x: Tensor) -> Tensor:
    """Quarter turn of neighbouring elements."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate_half(x: Tensor) -> Tensor:
    """Quarter turn of the halves."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def interleaved(config: Config) -> bool:
    """Whether neighbours are the pairs."""
    always = ("ernie4_5_moe", "deepseek_v2", "llama4_text", "deepseek_v32", "glm_moe_dsa")
    return bool(config["model_type"] in always or config.get("rope_interleave", False))


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool, last: bool = False, part: bool = False) -> Tensor:
    """Rotate all of each head, or a `part`, its first or `last` elements: x (b, heads, t, d), cos and sin (b, t, rotated), by halves."""
    if 2 * cos.shape[-1] == x.shape[-1] and not part:  # one angle for each pair, not for each element
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    n, c, s = cos.shape[-1], cos[:, None], sin[:, None]
    still, turning = (x[..., : x.shape[-1] - n], x[..., x.shape[-1] - n :]) if last else (x[..., n:], x[..., :n])
    if neighbours:
        c, s = (f[..., : n // 2].repeat_interleave(2, -1) for f in (c, s))
    out = turning * c + (rotate_every_two if neighbours else rotate_half)(turning) * s
    return torch.cat((still, out) if last else (out, still), -1)


@mistake("rotary: neighbours are the pairs, not halves", lambda config: not interleaved(config))
def _(subject: Subject) -> None:
    wrong = partial(turned, neighbours=True, part=rotates_part(subject.config))
    subject.turn(lambda right: lambda q, k, cos, sin: (wrong(q, cos, sin), wrong(k, cos, sin)))


@mistake("rotary: halves are the pairs, not neighbours", interleaved)
def _(subject: Subject) -> None:
    wrong = partial(turned, neighbours=False)
    subject.turn(lambda right: lambda q, k, cos, sin: (wrong(q, cos, sin), wrong(k, cos, sin)))


def rotates_part(config: Config) -> bool:
    """Whether part of a head is rotated."""
    return "partial_rotary_factor" in config or "rotary_dim" in config


@mistake("rotary: the last part of a head turned, not the first", rotates_part)
def _(subject: Subject) -> None:
    wrong = partial(turned, neighbours=False, last=True, part=True)
    subject.turn(lambda right: lambda q, k, cos, sin: (wrong(q, cos, sin), wrong(k, cos, sin)))


misread("rotary: the whole head turned", rotates_part, lambda config: {"partial_rotary_factor": 1.0, "rotary_dim": config["head_dim"]})


@mistake("rotary: frequencies of the whole head for the part that turns", rotates_part)
def _(subject: Subject) -> None:
    part = subject.rotary.inv_freq
    exponents = torch.arange(len(part)) * 2 / subject.config["head_dim"]
    part.copy_(subject.config["rope_theta"] ** -exponents)


@mistake("rotary: turned the other way")
def _(subject: Subject) -> None:
    subject.turn(lambda right: lambda q, k, cos, sin: right(q, k, cos, -sin))


@mistake("rotary: query one position ahead of the keys")
def _(subject: Subject) -> None:
    def wrap(right: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            rotary = subject.rotary
            frequencies = rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq
            step = frequencies.repeat(max(1, cos.shape[-1] // len(frequencies)))[None, None]
            ahead, _ = right(q, q, step.cos(), step.sin())
            return right(ahead, k, cos, sin)

        return wrong

    subject.turn(wrap)


misread("rotary: base 10000 whatever `rope_theta` says", always, lambda config: {"rope_theta": 1e4})
misread("rotary: scaling ignored", is_scaled, lambda config: {"rope_scaling": {"rope_type": "default"}})
misread("rotary: every frequency divided by `factor`", lambda c: is_scaled(c) and scaling(c).get("rope_type", "linear") != "linear",
        stretched_alike)  # fmt: skip


misread("rotary: the base times `alpha` itself", lambda config: "alpha" in scaling(config),
        lambda config: {"rope_scaling": None, "rope_theta": config["rope_theta"] * scaling(config)["alpha"]})  # fmt: skip


@mistake("rotary: attention factor ignored", has_attention_factor)
def _(subject: Subject) -> None:
    subject.rotary.attention_scaling = 1.0


misread("rotary: `beta_fast` and `beta_slow` ignored", has_options, rescaled(beta_fast=None, beta_slow=None))
misread("rotary: `truncate` ignored", lambda config: "truncate" in scaling(config), rescaled(truncate=None))
misread("rotary: `mscale` and `mscale_all_dim` ignored", lambda config: "mscale" in scaling(config),
        rescaled(mscale=None, mscale_all_dim=None))  # fmt: skip
misread("rotary: no frequencies between `low_freq_factor` and `high_freq_factor`", lambda c: "low_freq_factor" in scaling(c),
        lambda c: rescaled(high_freq_factor=scaling(c)["low_freq_factor"] * (1 + 1e-9))(c))  # fmt: skip


misread("rotary: `short_mscale` and `long_mscale` ignored", has_mscales, rescaled(short_mscale=1.0, long_mscale=1.0))
misread("rotary: `short_mscale` at every length", has_mscales, lambda c: rescaled(long_mscale=scaling(c)["short_mscale"])(c))
misread("rotary: `long_mscale` at every length", has_mscales, lambda c: rescaled(short_mscale=scaling(c)["long_mscale"])(c))


@mistake("rotary: `long_factor` beyond the original context", has_mscales)
def _(subject: Subject) -> None:
    right, length = subject.rotary.rope_init_fn, [0]

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        length[0] = int(kwargs["position_ids"].max()) + 1

    subject.rotary.register_forward_pre_hook(before, with_kwargs=True)
    subject.rotary.rope_init_fn = lambda config: right(config, seq_len=length[0])


@mistake("rotary: always as in the original context", lambda config: follows_length(config) and not has_mscales(config))
def _(subject: Subject) -> None:
    subject.rotary.rope_type = "default"


def factor_of_another_length(subject: Subject, longer: Callable[[], Tensor]) -> None:
    """Take the factor of a longer sequence."""
    kind = scaling(subject.config)

    def factor(length: Tensor) -> float:
        return float(kind["long_mscale" if int(length) > kind["original_max_position_embeddings"] else "short_mscale"])

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        positions = kwargs["position_ids"]
        ratio = factor((positions + longer()).max() + 1) / factor(positions.max() + 1)
        return out[0] * ratio, out[1] * ratio

    subject.rotary.register_forward_hook(after, with_kwargs=True)


def by_another_length(subject: Subject, longer: Callable[[], Tensor]) -> None:
    """Take frequencies, or the factor, of a longer sequence."""
    if has_mscales(subject.config):
        factor_of_another_length(subject, longer)
        return
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


def turns_locally(config: Config) -> bool:
    """Whether layers with a window turn by a base of their own."""
    return "rope_local_base_freq" in config


misread("rotary: layers with a window turn as the others", turns_locally,
        lambda c: {"rope_local_base_freq": c["rope_theta"]})  # fmt: skip
misread("rotary: every layer turns as those with a window", turns_locally,
        lambda c: {"rope_theta": c["rope_local_base_freq"]})  # fmt: skip
