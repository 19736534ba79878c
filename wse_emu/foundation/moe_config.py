"""MoE options under the names, defaults and rules of Cerebras ModelZoo (``model.moe`` of its YAML, release 2.10)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.routing_rule import MAX_EXPERTS, RoutingAlgorithm, RoutingRule, SelectionDtype, TiePolicy

Implementation = Literal["functional", "experimental", "optimized"]
Nonlinearity = Literal["softmax", "sigmoid", "sinkhorn"]
Fp16Type = Literal["bfloat16", "float16", "cbfloat16", "cb16", "float32"]
_UNSAID = ("softmax", None)
"""Scores that nobody asked for: ModelZoo's default, and its word for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Options of a mixture as ModelZoo names them; valid from birth, dense ones too. `routing` is the rule that they describe.

    ``ModelSpec.with_moe`` makes a model of them, ``from_pretrained(..., routing=config)`` puts them on a checkpoint.
    """

    num_experts: int = 0
    """Experts that are chosen among. With the shared ones 0 or 1 in all: a dense network, of which `top_k` says nothing."""
    num_shared_experts: int | None = None
    """Experts that every token visits, with weight 1; only with learned routing."""
    top_k: int = 1
    load_balancing_loss_coef: float = 0.0
    """Of training alone; must be 0 with hash and uniform routing, which learn nothing, and with sinkhorn, which balances."""
    null_expert_bias: float = 0.0
    moe_implementation: Implementation = "experimental"
    router_use_bias: bool = False
    router_fp32: bool = True
    routing_algorithm: RoutingAlgorithm = "learned"
    router_selection_nonlinearity: Nonlinearity | None = "softmax"
    """None is for hash and uniform routing, which have no scores; what is named there is ignored with a warning."""
    sinkhorn_n_iters: int = 1
    expert_weighting_nonlinearity: Nonlinearity | None = "softmax"
    """Likewise; the scores of the chosen ones. With "sinkhorn" and another selection ModelZoo's code chooses by sinkhorn's scores too; here
    each option says what its name says."""
    expert_weighting_normalization: bool = True
    gate_initializer: Any = None
    """How training begins the gate: a name or a description, of no account for weights that are there."""
    probability_before_ffn: bool = False
    fp16_type: Fp16Type = "bfloat16"
    """Format that probabilities are cast to before the choice; ModelZoo's option of that name for all of training; its "cbfloat16" is
    "cb16" here. "float32" casts nothing."""
    tie_policy: TiePolicy = "lowest_id"
    """As `RoutingRule.tie_policy`: ModelZoo leaves to its device which of equal probabilities is taken."""

    def __post_init__(self) -> None:
        self._check_experts()
        coef = self.load_balancing_loss_coef
        if type(coef) not in (int, float) or not 0 <= coef < math.inf:
            raise SpecError(f"`load_balancing_loss_coef` must be a finite number >= 0, got {show(coef)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise SpecError(f"`{name}` must be one of {', '.join(map(str, known))}, got {show(getattr(self, name))}")
        learned = self.routing_algorithm == "learned"
        if self.num_shared_experts is not None and not learned:
            raise SpecError(f"`num_shared_experts` needs `routing_algorithm` 'learned', got {self.routing_algorithm!r}")
        if coef > 0 and not learned:
            raise SpecError(f"`load_balancing_loss_coef` must be 0 with `routing_algorithm` {self.routing_algorithm!r}, got {coef!r}")
        if coef > 0 and self.router_selection_nonlinearity == "sinkhorn":
            raise SpecError(f"`load_balancing_loss_coef` must be 0 with `router_selection_nonlinearity` 'sinkhorn', got {coef!r}")
        if self.probability_before_ffn and self.moe_implementation != "experimental":
            raise SpecError(f"`probability_before_ffn` needs `moe_implementation` 'experimental', got {self.moe_implementation!r}")
        if not self.router_fp32 and self.fp16_type == "float32":
            raise SpecError("`router_fp32` False leaves logits in `fp16_type`: name one of 16 bits, got 'float32'")
        for name in ("router_selection_nonlinearity", "expert_weighting_nonlinearity"):
            value = getattr(self, name)
            if learned and value is None:
                raise SpecError(f"`{name}` must not be None with `routing_algorithm` 'learned': it makes the scores")
            if not learned and value not in _UNSAID:
                what = f"`{name}` {value!r} is ignored with `routing_algorithm` {self.routing_algorithm!r}, which has no scores"
                warnings.warn(what, stacklevel=3)  # the caller's line, behind the generated __init__
        for name in ("null_expert_bias", "router_use_bias"):
            if not learned and getattr(self, name):
                raise SpecError(f"`{name}` needs `routing_algorithm` 'learned', got {self.routing_algorithm!r}")
        self._learned()  # every other rule, whatever the algorithm
        if self.routing_algorithm == "hash" and self.top_k != 1:
            raise SpecError(f"`top_k` must be 1 with `routing_algorithm` 'hash', got {self.top_k}")

    def _check_experts(self) -> None:
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or value < (name == "top_k"):
                raise SpecError(f"`{name}` must be an integer >= {int(name == 'top_k')}, got {show(value)}")
        shared = self.num_shared_experts
        if shared is not None and (type(shared) is not int or shared < 1):
            raise SpecError(f"`num_shared_experts` must be an integer >= 1 or None, got {show(shared)}")
        if self.num_experts > MAX_EXPERTS:
            raise SpecError(f"`num_experts` must not exceed {MAX_EXPERTS} (ids of 16 bits), got {show(self.num_experts)}")
        if shared is not None and not self.num_experts:
            raise SpecError(f"`num_shared_experts` stand beside experts that are chosen: `num_experts` must be >= 1, got 0 and {shared}")
        if self.is_moe and self.top_k > self.num_experts:
            raise SpecError(f"`top_k` must lie in 1..{self.num_experts} (`num_experts`), got {show(self.top_k)}")

    @property
    def is_moe(self) -> bool:
        """Whether there is more than one expert, shared ones included."""
        return self.num_experts + (self.num_shared_experts or 0) > 1

    @property
    def routing(self) -> RoutingRule:
        """The rule; without learned scores, options that speak of scores are of no account, as in ModelZoo."""
        if self.routing_algorithm != "learned":
            return RoutingRule(routing_algorithm=self.routing_algorithm, probability_before_ffn=self.probability_before_ffn)
        return self._learned()

    def _learned(self) -> RoutingRule:
        """The rule of the options that speak of scores; where these are of no account, with the default ones."""
        learned = self.routing_algorithm == "learned"
        selection = (learned and self.router_selection_nonlinearity) or "softmax"
        weighting = (learned and self.expert_weighting_nonlinearity) or "softmax"
        return RoutingRule(
            router_selection_nonlinearity=selection,
            sinkhorn_n_iters=self.sinkhorn_n_iters,
            expert_weighting_nonlinearity=weighting,
            expert_weighting_normalization=self.expert_weighting_normalization,
            null_expert_bias=self.null_expert_bias,
            router_use_bias=self.router_use_bias,
            router_fp32=self.router_fp32,
            selection_dtype=_FORMATS[self.fp16_type],
            probability_before_ffn=self.probability_before_ffn,
            tie_policy=self.tie_policy,
        )


_FORMATS: dict[str, SelectionDtype] = {
    "bfloat16": "bfloat16", "float16": "float16", "cbfloat16": "cb16", "cb16": "cb16", "float32": "float32",
}  # fmt: skip
_CHOICES: dict[str, tuple[object, ...]] = {
    "routing_algorithm": get_args(RoutingAlgorithm),
    "moe_implementation": get_args(Implementation),
    "router_selection_nonlinearity": (*get_args(Nonlinearity), None),
    "expert_weighting_nonlinearity": (*get_args(Nonlinearity), None),
    "fp16_type": tuple(_FORMATS),
}
