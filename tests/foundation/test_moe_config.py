"""ModelZoo's MoE options: names, defaults and errors, and the rule that they describe."""

from __future__ import annotations

import pytest

from wse_emu.foundation.errors import SpecError
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.routing_rule import ROUTING_PRESETS, RoutingRule


def test_defaults_are_modelzoos() -> None:
    config = MoEConfig()
    assert (config.num_experts, config.num_shared_experts, config.top_k, config.load_balancing_loss_coef) == (0, None, 1, 0.0)
    assert (config.moe_implementation, config.router_fp32, config.is_moe) == ("experimental", True, False)
    assert config.routing == ROUTING_PRESETS["modelzoo"]
    assert MoEConfig(num_experts=1, num_shared_experts=1).is_moe


def test_options_say_the_rule() -> None:
    config = MoEConfig(
        num_experts=4, top_k=2, null_expert_bias=1.1, router_use_bias=True, router_fp32=False, router_selection_nonlinearity="sigmoid",
        fp16_type="cb16",
    )  # fmt: skip
    assert config.routing == RoutingRule(
        router_selection_nonlinearity="sigmoid", null_expert_bias=1.1, router_use_bias=True, router_fp32=False, selection_dtype="cb16"
    )
    assert MoEConfig(num_experts=4, routing_algorithm="hash").routing == RoutingRule(routing_algorithm="hash")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": -1}, "`num_experts` must be an integer >= 0, got -1"),
        ({"num_experts": 1 << 16}, "`num_experts` must not exceed 32768"),
        ({"num_experts": 4, "top_k": 0}, "`top_k` must be an integer >= 1, got 0"),
        ({"num_experts": 4, "top_k": 5}, r"`top_k` must lie in 1\.\.4"),
        ({"num_experts": 4, "top_k": 2, "routing_algorithm": "hash"}, "`top_k` must be 1 with `routing_algorithm` 'hash'"),
        ({"num_experts": 4, "num_shared_experts": 1, "routing_algorithm": "hash"}, "`num_shared_experts` needs"),
        ({"num_shared_experts": 0}, "`num_shared_experts` must be an integer >= 1 or None"),
        ({"load_balancing_loss_coef": -0.1}, "`load_balancing_loss_coef` must be a number >= 0"),
        ({"load_balancing_loss_coef": 0.1, "routing_algorithm": "hash"}, "must be 0 with `routing_algorithm` 'hash'"),
        ({"load_balancing_loss_coef": 0.1, "routing_algorithm": "uniform"}, "must be 0 with `routing_algorithm` 'uniform'"),
        ({"load_balancing_loss_coef": 0.1, "router_selection_nonlinearity": "sinkhorn"}, "must be 0 with `router_selection_nonlinearity`"),
        ({"expert_weighting_nonlinearity": "sinkhorn"}, "would leave the router without a gradient"),
        ({"num_experts": 4, "null_expert_bias": 1.0, "expert_weighting_normalization": False}, "`null_expert_bias` needs"),
        ({"num_experts": 4, "null_expert_bias": 1.0, "routing_algorithm": "hash"}, "`null_expert_bias` needs `routing"),
        ({"moe_implementation": "forge_experimental"}, "`moe_implementation` must be one of functional, experimental, optimized"),
        ({"router_selection_nonlinearity": "relu"}, "`router_selection_nonlinearity` must be one of"),
        ({"probability_before_ffn": True, "moe_implementation": "optimized"}, "`probability_before_ffn` needs `moe_implementation`"),
    ],
)  # fmt: skip
def test_contradictions_raise_as_in_modelzoo(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoEConfig(**options)
