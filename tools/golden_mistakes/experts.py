"""Mistakes in routing, in experts and in shared experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from golden_models import Config, by_sigmoid, has_correction, has_dense, has_sparse, is_llama4, shared_width
from golden_oracle import alias, compared, router_of
from torch import Tensor

from golden_mistakes.subject import Subject, is_clamped, is_dbrx, misread, mistake

# ---- shared experts


def shares(config: Config) -> bool:
    """Whether there are shared experts."""
    return shared_width(config) > 0


def gated(config: Config) -> bool:
    """Whether they have a gate of their own."""
    return "shared_expert_intermediate_size" in config


@mistake("shared experts: left out", shares)
def _(subject: Subject) -> None:
    for mlp in subject.shared:
        mlp.down_proj.weight.zero_()


@mistake("shared experts: gate and up exchanged", shares)
def _(subject: Subject) -> None:
    for mlp in subject.shared:
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@mistake("shared experts: multiplied by `routed_scaling_factor` too", lambda config: shares(config) and routed_scale(config) != 1)
def _(subject: Subject) -> None:
    for mlp in subject.shared:
        mlp.down_proj.weight.mul_(routed_scale(subject.config))


@mistake("shared experts: not gated", gated)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out: torch.full_like(out, float("inf")))


@mistake("shared experts: gate without sigmoid", gated)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.shared_expert_gate.register_forward_hook(lambda _m, _a, out: torch.logit(out.clamp(1e-6, 1 - 1e-6)))


# ---- experts


@mistake("experts: gate and up exchanged", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        if is_dbrx(subject.config):
            of = mlp.experts.mlp
            of.w1, of.v1 = of.v1, of.w1
            continue
        weight = mlp.experts.gate_up_proj
        if is_llama4(subject.config):
            weight.copy_(weight.roll(weight.shape[-1] // 2, -1))
            continue
        alternating = is_clamped(subject.config)
        weight.copy_(weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if alternating else weight.roll(weight.shape[1] // 2, 1))


@mistake("experts: order shifted by one", has_sparse)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        step = subject.config["intermediate_size"] if is_dbrx(subject.config) else 1
        for weight in mlp.experts.parameters():
            weight.copy_(weight.roll(step, 0))


@mistake("experts: `w2` of each read as (out, in)", is_dbrx)
def _(subject: Subject) -> None:
    f, h = (subject.config[name] for name in ("intermediate_size", "hidden_size"))
    for mlp in subject.sparse:
        weight = mlp.experts.mlp.w2
        weight.copy_(weight.view(-1, h, f).transpose(1, 2).reshape(-1, h))


@mistake("experts: rows of all alternate", is_dbrx)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        for weight in mlp.experts.parameters():
            weight.copy_(weight.view(-1, subject.config["num_local_experts"], weight.shape[1]).transpose(0, 1).flatten(0, 1))


@mistake("experts: halves are gate and up, not alternating columns", is_clamped)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        for weight in (mlp.experts.gate_up_proj, mlp.experts.gate_up_proj_bias):
            weight.copy_(weight.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))


for _name in ("gate_up_proj_bias", "down_proj_bias"):

    @mistake(f"experts: `{_name}` ignored", is_clamped)
    def _(subject: Subject, name: str = _name) -> None:
        for mlp in subject.sparse:
            getattr(mlp.experts, name).zero_()


@mistake("experts: `down_proj_bias` not weighted", is_clamped)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:

        def add(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            _, ids, weights = args
            return out + ((1 - weights)[..., None] * module.down_proj_bias[ids]).sum(1)

        mlp.experts.register_forward_hook(add)


misread("experts: `swiglu_limit` ignored", is_clamped, lambda config: {"swiglu_limit": 1e9})
misread("experts: `swiglu_alpha` ignored", is_clamped, lambda config: {"swiglu_alpha": 1.0})


def gated_by(subject: Subject, gate: Callable[[Tensor, Tensor, float, float], Tensor]) -> None:
    """Let experts gate by another formula of gate, up, alpha and limit."""
    for mlp in subject.sparse:
        alpha, limit = mlp.experts.alpha, mlp.experts.limit
        mlp.experts._apply_gate = lambda y, alpha=alpha, limit=limit: gate(y[..., ::2], y[..., 1::2], alpha, limit)


@mistake("experts: up without the 1", is_clamped)
def _(subject: Subject) -> None:
    gated_by(subject, lambda g, u, a, x: u.clamp(-x, x) * g.clamp(max=x) * (a * g.clamp(max=x)).sigmoid())


@mistake("experts: gate held from below too", is_clamped)
def _(subject: Subject) -> None:
    gated_by(subject, lambda g, u, a, x: (u.clamp(-x, x) + 1) * g.clamp(-x, x) * (a * g.clamp(-x, x)).sigmoid())


@mistake("experts: router's bias ignored", is_clamped)
def _(subject: Subject) -> None:
    for router in subject.routers:
        router.bias.zero_()


def weighs_outputs(config: Config) -> bool:
    """Whether weights belong to what experts give."""
    return has_sparse(config) and not is_llama4(config)


@mistake("experts: weights in the opposite order", is_llama4)
def _(subject: Subject) -> None:
    for router in subject.routers:
        router.register_forward_hook(lambda _m, _a, out: (out[0], out[1].flip(-1), out[2]))


@mistake("experts: weight on the output, not on the input", is_llama4)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:

        def forward(x: Tensor, mlp: Any = mlp) -> tuple[Tensor, Tensor]:
            flat = x.reshape(-1, x.shape[-1])
            logits, weights, ids = mlp.router(flat)
            scores = torch.zeros_like(logits).scatter(-1, ids, weights)
            outs = mlp.experts(flat.repeat(mlp.num_experts, 1)).view(mlp.num_experts, *flat.shape)
            return mlp.shared_expert(flat) + (scores.T[..., None] * outs).sum(0), logits

        mlp.forward = forward


@mistake("experts: columns of gate and up alternate, not halves", is_llama4)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        weight = mlp.experts.gate_up_proj
        weight.copy_(torch.cat((weight[..., ::2], weight[..., 1::2]), -1))


@mistake("experts: weights in the opposite order", weighs_outputs)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:
        mlp.experts.register_forward_pre_hook(lambda _m, args: (*args[:2], args[2].flip(-1)))


@mistake("experts: weight on the input, not on the output", weighs_outputs)
def _(subject: Subject) -> None:
    for mlp in subject.sparse:

        def forward(x: Tensor, ids: Tensor, weights: Tensor, right: Callable[..., Tensor] = mlp.experts.forward) -> Tensor:
            slots, flat = [(ids[:, [i]], weights[:, [i]]) for i in range(ids.shape[1])], x.flatten(0, -2)
            return sum((right(flat * w, i, torch.ones_like(w)).view_as(x) for i, w in slots), torch.zeros_like(x))

        mlp.experts.forward = forward


@mistake("experts: chosen before the norm", has_sparse)
def _(subject: Subject) -> None:
    for layer in subject.model.model.layers:
        router = router_of(layer)
        if router is not None:
            kept: list[Tensor] = []
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args, kept=kept: kept.__setitem__(slice(None), args))
            router.register_forward_pre_hook(lambda _m, args, kept=kept: (kept[0].view(-1, kept[0].shape[-1]), *args[1:]))


@mistake("dense and sparse networks exchanged between layers", lambda c: has_sparse(c) and has_dense(c))
def _(subject: Subject) -> None:
    layers = subject.model.model.layers
    sparse = next(layer for layer in layers if router_of(layer) is not None)
    dense = next(layer for layer in layers if router_of(layer) is None)
    if is_llama4(subject.config):
        sparse.feed_forward, dense.feed_forward = dense.feed_forward, sparse.feed_forward
        sparse.is_moe_layer, dense.is_moe_layer = False, True
        for layer in (sparse, dense):
            alias(layer, mlp=layer.feed_forward)
        return
    sparse.mlp, dense.mlp = dense.mlp, sparse.mlp


# ---- weights of the chosen ones


def normalized(config: Config) -> bool:
    """Whether there are mixtures whose weights are divided by their sum."""
    return has_sparse(config) and config.get("norm_topk_prob", True) and not by_sparsemixer(config) and not is_llama4(config)


def by_sparsemixer(config: Config) -> bool:
    """Whether each choice is weighed among the experts that are left and near it."""
    return "router_jitter_noise" in config


def raw(config: Config) -> bool:
    """Whether there are mixtures whose weights are not divided by their sum."""
    return has_sparse(config) and not normalized(config)


def routed_scale(config: Config) -> float:
    """Factor of all weights."""
    return float(config.get("routed_scaling_factor", 1.0))


def scores(config: Config, logits: Tensor) -> Tensor:
    """What weights are taken from."""
    return logits.sigmoid() if by_sigmoid(config) else logits.softmax(-1)


def weigh(subject: Subject, weights: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let routers weigh the chosen experts by `weights` of their logits, (tokens, experts), and choices, (tokens, k)."""
    for router in subject.routers:
        router.register_forward_hook(lambda _m, _a, out: (out[0], weights(out[0], out[2]), out[2]))


@mistake("experts: weights not divided by their sum", normalized)
def _(subject: Subject) -> None:
    config = subject.config
    weigh(subject, lambda logits, ids: scores(config, logits).gather(-1, ids) * routed_scale(config))


@mistake("experts: weights divided by their sum (softmax after the choice)", raw)
def _(subject: Subject) -> None:
    weigh(subject, lambda logits, ids: logits.gather(-1, ids).softmax(-1))


def score_exchanged(subject: Subject, score: Callable[[Tensor], Tensor]) -> None:
    """Take weights from another score."""

    def weights(logits: Tensor, ids: Tensor) -> Tensor:
        chosen = score(logits).gather(-1, ids)
        chosen = chosen / chosen.sum(-1, keepdim=True) if normalized(subject.config) else chosen
        return chosen * routed_scale(subject.config)

    weigh(subject, weights)


@mistake("experts: sigmoid in place of softmax", lambda config: has_sparse(config) and not by_sigmoid(config))
def _(subject: Subject) -> None:
    score_exchanged(subject, torch.sigmoid)


misread("experts: `router_jitter_noise` ignored", by_sparsemixer, lambda config: {"router_jitter_noise": 1e9})
misread("experts: band half as wide", by_sparsemixer, lambda config: {"router_jitter_noise": config["router_jitter_noise"] / 2})


@mistake("experts: a softmax over all of them, not sparsemixer's", by_sparsemixer)
def _(subject: Subject) -> None:
    weigh(subject, lambda logits, ids: logits.softmax(-1).gather(-1, ids))


@mistake("experts: the first choice counted beside the second", by_sparsemixer)
def _(subject: Subject) -> None:
    noise = subject.config["router_jitter_noise"]

    def weights(logits: Tensor, ids: Tensor) -> Tensor:
        best = logits.gather(-1, ids)[..., None]
        below = (best - logits[:, None]) / torch.maximum(logits.abs()[:, None], best)
        return 1 / torch.exp(logits[:, None] - best).masked_fill(below > 2 * noise, 0.0).sum(-1)

    weigh(subject, weights)


@mistake("experts: softmax in place of sigmoid", by_sigmoid)
def _(subject: Subject) -> None:
    score_exchanged(subject, lambda logits: logits.softmax(-1))


@mistake("experts: `routed_scaling_factor` ignored", lambda config: routed_scale(config) != 1)
def _(subject: Subject) -> None:
    for router in subject.routers:
        router.routed_scaling_factor = 1.0


@mistake("experts: `moe_norm_min` ignored", lambda config: "moe_norm_min" in config)
def _(subject: Subject) -> None:
    for router in subject.routers:
        router.norm_min = 0.0


# ---- correction bias and groups


@mistake("experts: correction bias ignored", has_correction)
def _(subject: Subject) -> None:
    for block in subject.sparse:
        for module in (block, block.gate, getattr(block.gate, "moe_statics", None)):
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.zero_()


@mistake("experts: correction bias in the weights too", has_correction)
def _(subject: Subject) -> None:
    config = subject.config
    for block in subject.sparse:

        def wrong(_m: Any, _a: Any, out: tuple[Tensor, ...], block: Any = block) -> tuple[Tensor, ...]:
            chosen = compared(block, out[0])[0].gather(-1, out[2])
            divisor = chosen.sum(-1, keepdim=True).clamp_min(config.get("moe_norm_min", 0.0)) if normalized(config) else 1.0
            return out[0], chosen / divisor * routed_scale(config), out[2]

        block.gate.register_forward_hook(wrong)


def grouped(config: Config) -> bool:
    """Whether only experts of some groups are open to a token."""
    return bool(config.get("n_group", 1) > 1)


@mistake("experts: groups ignored", grouped)
def _(subject: Subject) -> None:
    for router in subject.routers:
        router.num_group = router.topk_group = 1


@mistake("experts: groups scored by two experts, not by their best", lambda config: grouped(config) and not by_sigmoid(config))
def _(subject: Subject) -> None:
    for router in subject.routers:

        def wrong(module: Any, _a: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            chance = out[0].softmax(-1).unflatten(-1, (module.num_group, -1))
            groups = chance.topk(2, -1).values.sum(-1)
            is_open = torch.zeros_like(groups).scatter(-1, groups.topk(module.topk_group, -1).indices, 1.0).bool()
            chosen = chance.masked_fill(~is_open[..., None], 0.0).flatten(-2).topk(out[2].shape[-1], -1)
            return out[0], chosen.values * routed_scale(subject.config), chosen.indices

        router.register_forward_hook(wrong)


@mistake("experts: groups scored by their best expert, not by two", lambda config: grouped(config) and by_sigmoid(config))
def _(subject: Subject) -> None:
    config, k = subject.config, subject.config["num_experts_per_tok"]
    for router in subject.routers:

        def wrong(module: Any, _a: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            chance = (out[0].sigmoid() + module.e_score_correction_bias).unflatten(-1, (module.num_group, -1))
            groups = chance.amax(-1)
            is_open = torch.zeros_like(groups).scatter(-1, groups.topk(module.topk_group, -1).indices, 1.0).bool()
            ids = chance.masked_fill(~is_open[..., None], float("-inf")).flatten(-2).topk(k, -1).indices
            chosen = out[0].sigmoid().gather(-1, ids)
            return out[0], chosen / (chosen.sum(-1, keepdim=True) if normalized(config) else 1.0) * routed_scale(config), ids

        router.register_forward_hook(wrong)
