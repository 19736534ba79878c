"""Mistakes in what Llama 4 has of its own: chunks of keys, layers without rotation, norms without weights, queries that grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_models import Config, is_llama4
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from golden_mistakes.subject import Subject, misread, mistake

FULL, CHUNKED = "full_attention", "chunked_attention"


def kinds(config: Config, chunked: Callable[[bool], bool]) -> Config:
    """Which layers have chunks, by whether they are rotated."""
    return {"layer_types": [CHUNKED if chunked(bool(turns)) else FULL for turns in config["no_rope_layers"]]}


misread("attention: chunks ignored", is_llama4, lambda config: kinds(config, lambda turns: False))
misread("attention: chunks in every layer", is_llama4, lambda config: kinds(config, lambda turns: True))
misread("attention: chunks in the other layers", is_llama4, lambda config: kinds(config, lambda turns: not turns))
misread("attention: chunks one longer", is_llama4, lambda config: {"attention_chunk_size": config["attention_chunk_size"] + 1})
misread("attention: chunks one shorter", is_llama4, lambda config: {"attention_chunk_size": config["attention_chunk_size"] - 1})
TURNS: dict[str, Callable[[int], int]] = {
    "in every layer": lambda turns: 1, "in no layer": lambda turns: 0, "in the other layers": lambda turns: 1 - turns,
}  # fmt: skip
for _what, _turns in TURNS.items():
    misread(f"rotary: {_what}", is_llama4, lambda config, turns=_turns: {
        **kinds(config, bool), "no_rope_layers": [turns(t) for t in config["no_rope_layers"]]})  # fmt: skip


@mistake("attention: a window in place of chunks", is_llama4)
def _(subject: Subject) -> None:
    subject.model.config.sliding_window = subject.config["attention_chunk_size"]
    subject.replace("create_chunked_causal_mask", lambda right: create_sliding_window_causal_mask)


@mistake("norms of queries and keys: left out", is_llama4)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        if attention.use_rope:
            attention.qk_norm = nn.Identity()


@mistake("norms of queries and keys: epsilon ignored", is_llama4)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        if attention.use_rope:
            attention.qk_norm.eps = 0.0


@mistake("norms of queries and keys: in every layer", is_llama4)
def _(subject: Subject) -> None:
    norm = next(attention.qk_norm for attention in subject.attentions if attention.use_rope)
    for attention in subject.attentions:
        attention.qk_norm = norm


@mistake("norms of queries and keys: over all heads together", is_llama4)
def _(subject: Subject) -> None:
    def joint(norm: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + norm.eps)

    for attention in subject.attentions:
        if attention.use_rope:
            attention.qk_norm.forward = lambda x, norm=attention.qk_norm: joint(norm, x)


misread("queries' temperature: ignored", is_llama4, lambda config: {"attn_temperature_tuning": False})
misread("queries' temperature: `attn_scale` ignored", is_llama4, lambda config: {"attn_scale": 0.1})
misread("queries' temperature: `floor_scale` one more", is_llama4, lambda config: {"floor_scale": config["floor_scale"] + 1})


@mistake("queries' temperature: in every layer", is_llama4)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        if attention.use_rope:
            tuned(subject, attention, 1)


@mistake("queries' temperature: positions from 0", is_llama4)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        if not attention.use_rope:
            attention.attn_temperature_tuning = False
            tuned(subject, attention, 0)


def tuned(subject: Subject, attention: Any, first: int) -> None:
    """Let queries grow by their positions, counted from `first`; scores do as much."""
    config, positions = subject.config, [torch.zeros(0)]

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs["cache"].get_seq_length(module.layer_idx) if kwargs.get("cache") is not None else 0
        n = kwargs["hidden_states"].shape[1]
        positions[0] = torch.arange(n) + past

    def grow(module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        steps = ((positions[0] + first) / config["floor_scale"]).floor()
        return out * (torch.log1p(steps) * config["attn_scale"] + 1)[:, None]

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    if attention.use_rope:
        of_queries = config["num_attention_heads"]
        attention.qk_norm.register_forward_hook(
            lambda m, a, out: grow(m, a, out.flatten(2)).view_as(out) if out.shape[2] == of_queries else out
        )
    else:
        attention.q_proj.register_forward_hook(grow)
