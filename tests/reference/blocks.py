"""Mixtures of one layer, with random weights, under random rules."""

from __future__ import annotations

from typing import Any

import numpy as np

from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.shared_experts import SharedExperts
from wse_emu.reference.ffn import experts_ffn
from wse_emu.reference.tensors import Expert
from wse_emu.reference.weights import PublishedWeights
from wse_emu.testing.routing_rules import random_rule, random_rule_together

NAMES = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


class Block(PublishedWeights):
    """Weights of one layer, by role and expert."""

    def __init__(self, spec: ModelSpec, tensors: dict[tuple[str, Expert], np.ndarray]) -> None:
        super().__init__(spec, lambda name: tensors["", None], np.dtype(np.float64))
        self.tensors = tensors

    def layer(self, layer: int, role: str, expert: Expert = None) -> np.ndarray:
        return self.tensors[role, expert]

    def forward(self, x: np.ndarray, numbers: np.ndarray, ids: np.ndarray | None = None) -> dict[str, Any]:
        """Stages of `experts_ffn`; `ids` in place of the choice."""
        return dict(experts_ffn(self, 0, x, numbers, ids, together=np.zeros(len(x), np.int64)))

    def moved(self, step: float, along: dict[tuple[str, Expert], np.ndarray]) -> Block:
        """The block with ``tensor + step * along`` for every tensor."""
        return Block(self.spec, {key: value + step * along[key] if key in along else value for key, value in self.tensors.items()})


def spec_of(
    rule: Any, num_experts: int, top_k: int, hidden: int = 6, width: int = 5, shared: SharedExperts | None = None,
    clamped: ClampedExperts | None = None, activation: Any = "silu",
) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        family="mixtral", vocab_size=8, hidden_size=hidden, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=8, num_experts=num_experts, top_k=top_k, moe_intermediate_size=width,
        routing=rule, shared_experts=shared, clamped_experts=clamped, activation=activation,
    )  # fmt: skip


def block_of(spec: ModelSpec, rng: np.random.Generator) -> Block:
    """Random weights, of float32 numbers, that leave values near 1."""
    n, hidden, width, tensors = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size, dict[tuple[str, Expert], np.ndarray]()

    def draw(role: str, expert: Expert, *shape: int) -> None:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        tensors[role, expert] = (rng.standard_normal(shape) * scale).astype(np.float32).astype(np.float64)

    def network(expert: Expert, width: int) -> None:
        for name, shape in zip(NAMES, ((width, hidden), (width, hidden), (hidden, width), (width,), (width,), (hidden,)), strict=True):
            if len(shape) > 1 or (spec.clamped_experts is not None and expert != "shared"):
                draw(name, expert, *shape)

    for expert in range(n):
        network(expert, width)
    if spec.routing.is_learned:
        draw("router", None, n, hidden)
    for role in ("router_bias", "e_score_correction_bias"):
        if getattr(spec.routing, "router_use_bias" if role == "router_bias" else role):
            draw(role, None, n)
    if spec.shared_experts is not None:
        network("shared", spec.shared_experts.intermediate_size)
        if spec.shared_experts.gated:
            draw("shared_gate", None, 1, hidden)
    return Block(spec, tensors)


def drawn(seed: int, tokens: int) -> tuple[Block, np.ndarray, np.ndarray]:
    """A block of any rule and kind of expert, tokens (of float32 numbers), and the numbers that unlearned rules go by."""
    rng = np.random.default_rng(seed)
    if rng.integers(3) == 0:
        rule, n, top_k = random_rule_together(rng)
    else:
        rule, n, top_k = random_rule(rng, algorithms=("learned", "learned", "learned", "learned", "hash", "uniform"))
    kind = int(rng.integers(4))
    spec = spec_of(
        rule, n, top_k, int(rng.integers(1, 9)), int(rng.integers(1, 7)),
        shared=None if rng.integers(2) else SharedExperts(intermediate_size=int(rng.integers(1, 6)), gated=bool(rng.integers(2))),
        clamped=ClampedExperts(alpha=1.702, limit=0.75) if kind == 0 else None, activation="gelu_tanh" if kind == 1 else "silu",
    )  # fmt: skip
    x = rng.standard_normal((tokens, spec.hidden_size)).astype(np.float32).astype(np.float64)
    return block_of(spec, rng), x, rng.integers(0, 100, tokens)
