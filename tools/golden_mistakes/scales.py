"""Mistakes in biases, limits and constant factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_models import Config, has_output_bias, is_biased

from golden_mistakes.subject import Subject, is_dbrx, is_gemma, misread, mistake

for _which in ("q", "k", "v"):

    @mistake(f"bias of {_which}: ignored", is_biased)
    def _(subject: Subject, which: str = _which) -> None:
        for attention in subject.attentions:
            getattr(attention, which + "_proj").bias.zero_()


@mistake("bias of the output: ignored", has_output_bias)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.o_proj.bias.zero_()


def clipped(config: Config) -> bool:
    """Whether queries, keys and values are held within a limit."""
    return bool(config.get("clip_qkv"))


misread("clip: ignored", clipped, lambda config: {"clip_qkv": None})
misread("clip: ignored", is_dbrx, lambda config: {"attn_config": config["attn_config"] | {"clip_qkv": 1e9}})


@mistake("clip: after the rotation", is_dbrx)
def _(subject: Subject) -> None:
    limit = subject.config["attn_config"]["clip_qkv"]
    for attention in subject.attentions:
        attention.clip_qkv = 1e9
        # values are held as they should be
        n_kv = subject.config["num_key_value_heads"] * subject.config["head_dim"]
        attention.Wqkv.register_forward_hook(lambda _m, _a, out, n=n_kv: torch.cat([out[..., :-n], out[..., -n:].clamp(-limit, limit)], -1))
    subject.replace("apply_rotary_pos_emb", lambda right: lambda *args: tuple(x.clamp(-limit, limit) for x in right(*args)))


@mistake("queries, keys and values: keys and values exchanged", is_dbrx)
def _(subject: Subject) -> None:
    n_kv = subject.config["num_key_value_heads"] * subject.config["head_dim"]
    for attention in subject.attentions:
        rows = attention.Wqkv.weight
        rows.copy_(torch.cat([rows[: -2 * n_kv], rows[-n_kv:], rows[-2 * n_kv : -n_kv]]))



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
misread("attention: soft cap of the scores ignored", scaled_by("attn_logit_softcapping"), lambda config: {"attn_logit_softcapping": None})


@mistake("attention: soft cap before the scores are scaled", scaled_by("attn_logit_softcapping"))
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.attn_logit_softcapping = subject.config["attn_logit_softcapping"] * attention.scaling


misread("head: soft cap ignored", scaled_by("final_logit_softcapping"), lambda config: {"final_logit_softcapping": None})


@mistake("scales: embedding not multiplied", is_gemma)
def _(subject: Subject) -> None:
    root = subject.config["hidden_size"] ** 0.5
    first = subject.model.model.layers[0]
    first.register_forward_pre_hook(lambda _m, args: (args[0] / root, *args[1:]))
