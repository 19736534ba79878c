"""Options that put another routing rule on a model."""

from __future__ import annotations

from dataclasses import fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import ConfigError, InputError

if TYPE_CHECKING:
    from wse_emu.foundation.model_spec import ModelSpec
    from wse_emu.foundation.moe_config import MoEConfig
    from wse_emu.foundation.routing_rule import RoutingRule


class Ties(StrEnum):
    """Which of equal scores is preferred."""

    LOWEST_ID = "lowest_id"
    HIGHEST_ID = "highest_id"
    REJECT = "reject"


Routing = Annotated[
    str | None,
    typer.Option(
        "--routing", metavar="RULE",
        help="Another routing rule: a preset (switch, ...), or a JSON object of RoutingRule's fields, or of MoEConfig's with num_experts.",
    ),
]  # fmt: skip
TiePolicy = Annotated[
    Ties | None, typer.Option("--tie-policy", help="Which of equal router scores is preferred; reject: an error where that decides.")
]


class RuleOptions(NamedTuple):
    """What was asked of routing."""

    routing: str | None = None
    tie_policy: Ties | None = None

    def rule(self, spec: ModelSpec) -> RoutingRule | MoEConfig | None:
        """The rule that is asked for, as `from_pretrained` takes it; None leaves the checkpoint's own. A tie policy alone changes that."""
        from wse_emu.foundation.routing_rule import preset

        given: RoutingRule | MoEConfig | None = None
        if self.routing is not None:
            given = _described(self.routing) if self.routing.lstrip().startswith("{") else preset(self.routing)
        if self.tie_policy is None:
            return given
        return replace(spec.routing if given is None else given, tie_policy=self.tie_policy.value)


def routed(spec: ModelSpec, rule: RoutingRule | MoEConfig | None) -> ModelSpec:
    """The checkpoint's model under that rule, if there is one."""
    return spec if rule is None else spec.with_routing(rule, learned=True)


def _described(text: str) -> RoutingRule | MoEConfig:
    """A rule of a JSON object: its fields, or ModelZoo's options where the number of experts is one of them."""
    from wse_emu.checkpoint.jsonfile import parse_object
    from wse_emu.foundation.moe_config import MoEConfig
    from wse_emu.foundation.routing_rule import RoutingRule

    try:
        options = parse_object(text.encode("utf-8", "replace"), where="--routing", error=ConfigError)
    except ConfigError as error:
        raise InputError(str(error)) from error
    kind = MoEConfig if "num_experts" in options else RoutingRule
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise InputError(f"--routing: {kind.__name__} has no {show(name)}, but {', '.join(known)}")
    return kind(**options)
