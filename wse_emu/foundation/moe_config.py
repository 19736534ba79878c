"""MoE options under the names, defaults and rules of Cerebras ModelZoo (``model.moe`` of its YAML, release 2.10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.routing_rule import RoutingAlgorithm, RoutingRule, SelectionDtype

Implementation = Literal["functional", "experimental", "optimized"]
Nonlinearity = Literal["softmax", "sigmoid"]
SelectionNonlinearity = Literal["softmax", "sigmoid", "sinkhorn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Options of a mixture as ModelZoo names them; valid from birth. `routing` is the rule that they describe."""

    num_experts: int = 0
    """0 or 1 is a dense network."""
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
    router_selection_nonlinearity: SelectionNonlinearity = "softmax"
    sinkhorn_n_iters: int = 1
    expert_weighting_nonlinearity: Nonlinearity = "softmax"
    expert_weighting_normalization: bool = True
    probability_before_ffn: bool = False
    fp16_type: SelectionDtype = "bfloat16"
    """Format that probabilities are cast to before the choice; ModelZoo's option of that name for all of training."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or value < (name == "top_k"):
                raise SpecError(f"`{name}` must be an integer >= {int(name == 'top_k')}, got {value!r}")
        shared = self.num_shared_experts
        if shared is not None and (type(shared) is not int or shared < 1):
            raise SpecError(f"`num_shared_experts` must be an integer >= 1 or None, got {shared!r}")
        if shared is not None and self.routing_algorithm != "learned":
            raise SpecError(f"`num_shared_experts` needs `routing_algorithm` 'learned', got {self.routing_algorithm!r}")
        if self.num_experts > 1 and self.top_k > self.num_experts:
            raise SpecError(f"`top_k` must lie in 1..{self.num_experts} (`num_experts`), got {self.top_k}")
        coef = self.load_balancing_loss_coef
        if type(coef) not in (int, float) or not coef >= 0:
            raise SpecError(f"`load_balancing_loss_coef` must be a number >= 0, got {coef!r}")
        if coef > 0 and self.routing_algorithm != "learned":
            raise SpecError(f"`load_balancing_loss_coef` must be 0 with `routing_algorithm` {self.routing_algorithm!r}, got {coef!r}")
        if coef > 0 and self.router_selection_nonlinearity == "sinkhorn":
            raise SpecError(f"`load_balancing_loss_coef` must be 0 with `router_selection_nonlinearity` 'sinkhorn', got {coef!r}")
        if self.moe_implementation not in get_args(Implementation):
            raise SpecError(f"`moe_implementation` must be one of {', '.join(get_args(Implementation))}, got {self.moe_implementation!r}")
        weighting: str = self.expert_weighting_nonlinearity
        if weighting == "sinkhorn":
            raise SpecError(
                "`expert_weighting_nonlinearity` 'sinkhorn' would leave the router without a gradient, for its scores are detached: use "
                "'softmax' or 'sigmoid'"
            )
        for name, known in (("router_selection_nonlinearity", SelectionNonlinearity), ("expert_weighting_nonlinearity", Nonlinearity)):
            if getattr(self, name) not in get_args(known):
                raise SpecError(f"`{name}` must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        if self.probability_before_ffn and self.moe_implementation != "experimental":
            raise SpecError(f"`probability_before_ffn` needs `moe_implementation` 'experimental', got {self.moe_implementation!r}")
        if self.num_experts > 1:
            self.routing.check_sizes(self.num_experts, self.top_k)

    @property
    def is_moe(self) -> bool:
        """Whether there is more than one expert, shared ones included."""
        return self.num_experts + (self.num_shared_experts or 0) > 1

    @property
    def routing(self) -> RoutingRule:
        """The rule; without learned scores, options that speak of scores are of no account, as in ModelZoo."""
        if self.routing_algorithm != "learned":
            if self.null_expert_bias or self.router_use_bias:
                name = "null_expert_bias" if self.null_expert_bias else "router_use_bias"
                raise SpecError(f"`{name}` needs `routing_algorithm` 'learned', got {self.routing_algorithm!r}")
            return RoutingRule(routing_algorithm=self.routing_algorithm, probability_before_ffn=self.probability_before_ffn)
        return RoutingRule(
            router_selection_nonlinearity=self.router_selection_nonlinearity,
            sinkhorn_n_iters=self.sinkhorn_n_iters,
            expert_weighting_nonlinearity=self.expert_weighting_nonlinearity,
            expert_weighting_normalization=self.expert_weighting_normalization,
            null_expert_bias=self.null_expert_bias,
            router_use_bias=self.router_use_bias,
            router_fp32=self.router_fp32,
            selection_dtype=self.fp16_type,
            probability_before_ffn=self.probability_before_ffn,
        )
