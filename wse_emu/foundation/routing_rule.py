"""Which experts a token visits and with which weight: one rule, put together from the pieces that published models use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, get_args

from wse_emu.foundation.arguments import MAX_FLOAT32, show
from wse_emu.foundation.errors import SpecError

RoutingAlgorithm = Literal["learned", "hash", "uniform"]
Selection = Literal["softmax", "sigmoid", "sqrtsoftplus", "none", "sinkhorn"]
Weighting = Literal["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sparsemixer", "sinkhorn"]
GroupScore = Literal["max", "top2_sum"]
TiePolicy = Literal["lowest_id", "highest_id", "reject"]
Chooser = Literal["token", "expert"]
Overflow = Literal["drop", "reroute"]
SelectionDtype = Literal["float32", "bfloat16", "float16", "cb16"]
MAX_EXPERTS = 1 << 15
"""Most experts of a layer: ids are 16-bit numbers on the wafer (ModelZoo)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """How a router decides; valid from birth. The default is Mixtral's.

    For every token: logits (plus the router's bias), a score for each expert, plus the correction bias, groups, the `top_k` highest; then
    the weights of the chosen ones, divided by their sum, times the scale. Names are those of ModelZoo's MoE options and of Hugging Face's
    configurations. Relations to the number of experts are checked by `check_sizes`, which `ModelSpec` calls.

    Three pieces let tokens meet (`tokens_meet`): sinkhorn, a capacity, and experts that choose. Those that meet are the new
    tokens of one sequence in one forward pass. Neighbours in a batch and padding still change nothing; prompt chunks do, and a step with
    a cache is not what the whole sequence would give.
    """

    routing_algorithm: RoutingAlgorithm = "learned"
    """"learned": by the scores. "hash": the one expert ``token id mod experts``, weight 1. "uniform": position ``s`` visits ``(s + j) mod
    experts`` for ``j < top_k``, weight ``1 / top_k`` each. The latter two have no gate."""
    router_selection_nonlinearity: Selection = "softmax"
    """From logits to the scores that are compared; "none" compares the logits. "sqrtsoftplus" is ``sqrt(log(1 + exp(x)))``.
    "sinkhorn" takes from the logits their log-sum over experts, then that over the tokens that meet, `sinkhorn_n_iters` times, then
    exp."""
    sinkhorn_n_iters: int = 1
    """Rounds of sinkhorn, in choice and weights; of no account without it."""
    chooser: Chooser = "token"
    """Who chooses: a token its `top_k` experts, or an expert the tokens that score highest, as many as its capacity (Zhou et al. 2022);
    then a token visits any number of experts, in ascending order, and `top_k` is their mean."""
    capacity_factor: float | None = None
    """An expert takes at most ``ceil(capacity_factor * tokens that meet * top_k / experts)`` tokens; None sets no limit (with `chooser`
    "expert": 1)."""
    overflow: Overflow = "drop"
    """What happens to a choice that finds its expert full: it is dropped and the token visits fewer (Switch), or the token tries its next
    best, until it has `top_k` or none is left ("no token left behind"). First choices come before second ones, earlier tokens before later
    ones. Weights are those of the experts that a token does visit."""
    e_score_correction_bias: bool = False
    """Whether a learned bias of each expert is added to the scores for the choice, and not to the weights."""
    n_group: int = 1
    """Groups of as many neighbouring experts each."""
    topk_group: int = 1
    """Groups that are open to a token: those of the highest group scores."""
    group_score: GroupScore = "max"
    """Score of a group: its highest, or the sum of its two highest."""
    tie_policy: TiePolicy = "lowest_id"
    """Which of equal scores (or groups) is preferred; "reject" raises where that changes the set of experts."""
    expert_weighting_nonlinearity: Weighting = "softmax"
    """From logits to weights: over all experts, or "softmax_topk" over the chosen ones alone ("top-k before softmax"), or "sparsemixer"
    (Phi-3.5-MoE at inference): for each choice a softmax over the experts that are left and whose logits lie within ``2 *
    router_jitter_noise`` of the chosen one's, relatively; or "sinkhorn", of which, as in ModelZoo, no gradient is taken."""
    expert_weighting_normalization: bool = True
    """Whether the chosen weights are divided by their sum (``norm_topk_prob``)."""
    null_expert_bias: float = 0.0
    """Constant added to that sum."""
    norm_epsilon: float = 0.0
    """Added to it as well, against a division by zero (DeepSeek: 1e-20)."""
    norm_min: float = 0.0
    """The divisor's least value (ERNIE: ``moe_norm_min``)."""
    routed_scaling_factor: float = 1.0
    """Factor of all weights, last of all."""
    router_jitter_noise: float = 0.0
    """Width of sparsemixer's band."""
    router_use_bias: bool = False
    """Whether the gate has a bias, added to the logits."""
    router_fp32: bool = True
    """Whether logits stay float32; else they are rounded to `selection_dtype` before the score is taken."""
    selection_dtype: SelectionDtype = "float32"
    """Format that scores are rounded to before the choice; weights are taken from the rounded scores where both come from one formula."""
    probability_before_ffn: bool = False
    """Whether an expert's input is multiplied by the weight, instead of its output."""

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise SpecError(f"`{name}` must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        for name in _SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        for name in ("n_group", "topk_group"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SpecError(f"`{name}` must be an integer >= 1, got {value!r}")
        for name in ("null_expert_bias", "norm_epsilon", "norm_min", "routed_scaling_factor", "router_jitter_noise"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= MAX_FLOAT32:
                raise SpecError(f"`{name}` must be a number >= 0 that float32 can hold, got {value!r}")
        if self.routed_scaling_factor == 0:
            raise SpecError("`routed_scaling_factor` must be above 0: no expert would count")
        if self.topk_group > self.n_group:
            raise SpecError(f"`topk_group` must not exceed `n_group`, got {self.topk_group} of {self.n_group}")
        if type(self.sinkhorn_n_iters) is not int or self.sinkhorn_n_iters < 1:
            raise SpecError(f"`sinkhorn_n_iters` must be an integer >= 1, got {self.sinkhorn_n_iters!r}")
        factor = self.capacity_factor
        if factor is not None and (type(factor) not in (int, float) or not math.isfinite(factor) or factor <= 0):
            raise SpecError(f"`capacity_factor` must be a finite number > 0 or None, got {factor!r}")
        self._check_weighting()
        self._check_meeting()
        if not self.router_fp32 and self.selection_dtype == "float32":
            raise SpecError("`router_fp32` False rounds logits to `selection_dtype`: name one of 16 bits")
        if self.routing_algorithm != "learned":
            self._check_unlearned()

    def _check_weighting(self) -> None:
        kind = self.expert_weighting_nonlinearity
        if kind in ("softmax_topk", "sparsemixer") and self.expert_weighting_normalization:
            raise SpecError(f"`expert_weighting_normalization` must be False with `expert_weighting_nonlinearity` {kind!r}")
        if kind == "sparsemixer" and (self.router_selection_nonlinearity != "none" or self.e_score_correction_bias or self.n_group > 1):
            raise SpecError("sparsemixer chooses by logits alone: `router_selection_nonlinearity` 'none', no correction bias, no groups")
        if (self.router_jitter_noise > 0) != (kind == "sparsemixer"):
            raise SpecError("`router_jitter_noise` above 0 and `expert_weighting_nonlinearity` 'sparsemixer' belong together")
        for name in ("null_expert_bias", "norm_epsilon", "norm_min"):
            if getattr(self, name) and not self.expert_weighting_normalization:
                raise SpecError(f"`{name}` needs `expert_weighting_normalization` True: there is no sum that it could belong to")

    def _check_meeting(self) -> None:
        if self.overflow == "reroute" and (self.capacity_factor is None or self.chooser == "expert"):
            raise SpecError("`overflow` 'reroute' needs a `capacity_factor`, and tokens that choose (`chooser` 'token')")
        if self.capacity_factor is not None and self.tie_policy == "reject":
            raise SpecError("`tie_policy` 'reject' does not go with `capacity_factor`: who finds room is no matter of one token's scores")
        if self.expert_weighting_nonlinearity == "sparsemixer" and self.has_capacity:
            raise SpecError("sparsemixer weighs by the order of a token's own choices: no `capacity_factor`, `chooser` 'token'")
        if self.chooser == "expert":
            if self.n_group > 1:
                raise SpecError(f"`n_group` must be 1 with `chooser` 'expert': no token opens groups; got {self.n_group}")
            if self.tie_policy != "lowest_id":
                raise SpecError("`tie_policy` must be 'lowest_id' with `chooser` 'expert': of equal scores the earlier token's is taken")
            if self.expert_weighting_normalization or self.expert_weighting_nonlinearity == "softmax_topk":
                raise SpecError(
                    "with `chooser` 'expert' weights are the scores themselves: `expert_weighting_normalization` False and no softmax over "
                    "the chosen ones"
                )

    def _check_unlearned(self) -> None:
        if self.tokens_meet:
            raise SpecError(
                f"sinkhorn, `capacity_factor` and `chooser` 'expert' need scores, `routing_algorithm` {self.routing_algorithm!r} has none"
            )
        for name in ("e_score_correction_bias", "router_use_bias"):
            if getattr(self, name):
                raise SpecError(f"`{name}` must be False with `routing_algorithm` {self.routing_algorithm!r}: it has no scores")
        if self.n_group > 1:
            raise SpecError(f"`n_group` must be 1 with `routing_algorithm` {self.routing_algorithm!r}, got {self.n_group}")
        if self.null_expert_bias:
            raise SpecError(f"`null_expert_bias` must be 0 with `routing_algorithm` {self.routing_algorithm!r}")

    def check_sizes(self, num_experts: int, top_k: int) -> None:
        """Hold the rule against the sizes of a layer.

        Raises
        ------
        SpecError
            If there are more than 32,768 experts; `top_k` is not 1 with hash; groups do not divide the experts, hold fewer than two where
            two are summed, or leave fewer than `top_k` experts open.
        """
        if num_experts > MAX_EXPERTS:
            raise SpecError(f"`num_experts` must not exceed {MAX_EXPERTS} (ids of 16 bits), got {num_experts}")
        if self.routing_algorithm == "hash" and top_k != 1:
            raise SpecError(f"`top_k` must be 1 with `routing_algorithm` 'hash', got {top_k}")
        if num_experts % self.n_group:
            raise SpecError(f"`n_group` must divide the experts, got {self.n_group} groups of {num_experts} experts")
        size = num_experts // self.n_group
        if self.n_group > 1 and self.group_score == "top2_sum" and size < 2:
            raise SpecError(f"`group_score` 'top2_sum' needs two experts in a group, got {self.n_group} groups of {num_experts} experts")
        if self.topk_group * size < top_k:
            raise SpecError(f"`topk_group` leaves {self.topk_group * size} experts open, fewer than the {top_k} to choose (`top_k`)")

    def check_weights(self, learned: RoutingRule) -> None:
        """Hold the rule against what a router has learned that was made for the rule `learned`.

        A gate or a bias that this rule does not ask for may be there.

        Raises
        ------
        SpecError
            If this rule asks for a gate, a bias of the gate or a correction bias that is not there.
        """
        asked = {
            "`routing_algorithm` 'learned'": (self.is_learned, learned.is_learned, "gate"),
            "`router_use_bias` True": (self.router_use_bias, learned.router_use_bias, "bias of the gate"),
            "`e_score_correction_bias` True": (self.e_score_correction_bias, learned.e_score_correction_bias, "correction bias"),
        }
        for what, (wanted, there, name) in asked.items():
            if wanted and not there:
                raise SpecError(f"`routing`: {what} needs a {name}, which this checkpoint's routers have not; choose a rule without")

    @property
    def is_learned(self) -> bool:
        """Whether there is a gate."""
        return self.routing_algorithm == "learned"

    @property
    def has_capacity(self) -> bool:
        """Whether experts take no more than a number of tokens; a token may then visit fewer than there are slots, or none."""
        return self.capacity_factor is not None or self.chooser == "expert"

    @property
    def tokens_meet(self) -> bool:
        """Whether a token's experts, or their weights, depend on the other new tokens of its sequence."""
        return self.has_capacity or self.router_selection_nonlinearity == "sinkhorn" or self.weighs_together

    def capacity(self, n_tokens: int, num_experts: int, top_k: int) -> int:
        """Most tokens of an expert, of `n_tokens` that meet."""
        if not self.has_capacity:
            return n_tokens
        factor = Fraction(1 if self.capacity_factor is None else self.capacity_factor)
        return min(n_tokens, math.ceil(factor * n_tokens * top_k / num_experts))

    def slots(self, num_experts: int, top_k: int) -> int:
        """Most experts that one token visits."""
        return num_experts if self.chooser == "expert" else top_k

    @property
    def weighs_together(self) -> bool:
        """Whether a token's weights are shares of all tokens that meet: sinkhorn's."""
        return self.expert_weighting_nonlinearity == "sinkhorn"

    @property
    def weights_jump(self) -> bool:
        """Whether weights are no continuous function of the logits: rounded to 16 bits, or shut out at a threshold."""
        return self.is_learned and (self.selection_dtype != "float32" or self.expert_weighting_nonlinearity == "sparsemixer")

    def params_per_expert(self, hidden_size: int) -> int:
        """Parameters of the router for each expert: its column of the gate, and biases."""
        return hidden_size * self.is_learned + self.router_use_bias + self.e_score_correction_bias


_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "routing_algorithm": get_args(RoutingAlgorithm),
    "router_selection_nonlinearity": get_args(Selection),
    "group_score": get_args(GroupScore),
    "chooser": get_args(Chooser),
    "overflow": get_args(Overflow),
    "tie_policy": get_args(TiePolicy),
    "expert_weighting_nonlinearity": get_args(Weighting),
    "selection_dtype": get_args(SelectionDtype),
})  # fmt: skip
_SWITCHES = ("e_score_correction_bias", "expert_weighting_normalization", "router_use_bias", "router_fp32", "probability_before_ffn")

MIXTRAL_ROUTING = RoutingRule()
"""The default."""

ROUTING_PRESETS: Mapping[str, RoutingRule] = MappingProxyType({
    "mixtral": MIXTRAL_ROUTING,
    "qwen": RoutingRule(),
    "deepseek_v2": RoutingRule(n_group=8, topk_group=3, expert_weighting_normalization=False, routed_scaling_factor=16.0),
    "deepseek_v3": RoutingRule(
        router_selection_nonlinearity="sigmoid", expert_weighting_nonlinearity="sigmoid", e_score_correction_bias=True, n_group=8,
        topk_group=4, group_score="top2_sum", norm_epsilon=1e-20, routed_scaling_factor=2.5,
    ),
    "gpt_oss": RoutingRule(
        router_selection_nonlinearity="none", expert_weighting_nonlinearity="softmax_topk", expert_weighting_normalization=False,
        router_use_bias=True,
    ),
    "modelzoo": RoutingRule(selection_dtype="bfloat16"),
    "switch": RoutingRule(capacity_factor=1.25, expert_weighting_normalization=False),
})  # fmt: skip
"""Rules of published models, by name, as their configurations have them; ``dataclasses.replace`` varies one. "modelzoo" is its default:
probabilities cast to 16 bits before the choice. "switch" is meant for `top_k` 1 (Fedus et al. 2022)."""


def preset(name: str) -> RoutingRule:
    """The rule of `ROUTING_PRESETS` that has this name; `SpecError` lists them if there is none."""
    if name not in ROUTING_PRESETS:
        raise SpecError(f"`routing` must be one of {', '.join(ROUTING_PRESETS)}, a RoutingRule or a MoEConfig, got {show(name)}")
    return ROUTING_PRESETS[name]
