"""Mistakes in latent attention."""

from __future__ import annotations

from golden_models import Config, is_latent
from torch import nn

from golden_mistakes.rotary import scaling
from golden_mistakes.subject import Subject, mistake


def has_short_queries(config: Config) -> bool:
    """Whether queries are made of a short vector."""
    return config.get("q_lora_rank") is not None


def scales_scores(config: Config) -> bool:
    """Whether a stretched context changes the scale of the scores."""
    return is_latent(config) and "mscale_all_dim" in scaling(config)


for _name, _what, _applies in (("kv_a_layernorm", "latent", is_latent), ("q_a_layernorm", "query's latent", has_short_queries)):

    @mistake(f"{_what}: not normalised", _applies)
    def _(subject: Subject, name: str = _name) -> None:
        for attention in subject.attentions:
            setattr(attention, name, nn.Identity())

    @mistake(f"{_what}: weight of the norm ignored", _applies)
    def _(subject: Subject, name: str = _name) -> None:
        for attention in subject.attentions:
            getattr(attention, name).weight.fill_(1.0)

    @mistake(f"{_what}: `rms_norm_eps` as the norm's epsilon", _applies)
    def _(subject: Subject, name: str = _name) -> None:
        for attention in subject.attentions:
            getattr(attention, name).variance_epsilon = subject.config["rms_norm_eps"]


@mistake("latent: rotary key before the latent", is_latent)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        weight = attention.kv_a_proj_with_mqa.weight
        weight.copy_(weight.roll(-subject.config["qk_rope_head_dim"], 0))


@mistake("latent: a head's values before its keys", is_latent)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        weight, heads = attention.kv_b_proj.weight, subject.config["num_attention_heads"]
        weight.copy_(weight.unflatten(0, (heads, -1)).roll(-subject.config["qk_nope_head_dim"], 1).flatten(0, 1))


@mistake("latent: all heads' keys before all heads' values", is_latent)
def _(subject: Subject) -> None:
    heads, nope, of_value = (subject.config[name] for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    for attention in subject.attentions:
        weight = attention.kv_b_proj.weight
        keys, values = weight.split((heads * nope, heads * of_value))
        by_head = [part.unflatten(0, (heads, -1)) for part in (keys.clone(), values.clone())]
        for head, rows in enumerate(weight.unflatten(0, (heads, -1))):
            rows[:nope].copy_(by_head[0][head])
            rows[nope:].copy_(by_head[1][head])


@mistake("latent: the rotated part of a query first", is_latent)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        weight = (attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj).weight
        heads = subject.config["num_attention_heads"]
        weight.copy_(weight.unflatten(0, (heads, -1)).roll(-subject.config["qk_rope_head_dim"], 1).flatten(0, 1))


@mistake("latent: scores scaled by what is not rotated", is_latent)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.scaling *= (attention.qk_head_dim / attention.qk_nope_head_dim) ** 0.5


@mistake("latent: scores scaled without `mscale_all_dim`", scales_scores)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.scaling = attention.qk_head_dim**-0.5


@mistake("latent: `mscale_all_dim` in the scale once, not squared", scales_scores)
def _(subject: Subject) -> None:
    for attention in subject.attentions:
        attention.scaling = (attention.scaling * attention.qk_head_dim**-0.5) ** 0.5
