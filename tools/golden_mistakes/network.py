"""Mistakes in the residual stream and in feed-forward networks."""

from __future__ import annotations

from typing import Any

from golden_models import has_dense
from golden_oracle import network
from torch import Tensor

from golden_mistakes.subject import Subject, is_clamped, is_dbrx, is_gemma, misread, mistake


def without_residual(source: Any, sink: Any, factor: float) -> None:
    """Take the input of `source` away from the output of `sink`, to which it is about to be added."""
    kept: list[Tensor] = []

    def subtract(module: Any, args: tuple[Any, ...], out: Any) -> Any:
        before = kept[0] / factor
        return out - before if isinstance(out, Tensor) else (out[0] - before.view_as(out[0]), *out[1:])

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


misread("feed-forward: gelu in place of silu", lambda config: not (is_gemma(config) or is_clamped(config)),
        lambda c: {"ffn_config": c["ffn_config"] | {"ffn_act_fn": {"name": "gelu"}}} if is_dbrx(c) else {"hidden_act": "gelu"})  # fmt: skip
misread("feed-forward: silu in place of gelu", is_gemma, lambda config: {"hidden_activation": "silu"})
misread("feed-forward: gelu itself, not its tanh form", is_gemma, lambda config: {"hidden_activation": "gelu"})


@mistake("feed-forward: gate and up exchanged", has_dense)
def _(subject: Subject) -> None:
    for mlp in subject.dense:
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
