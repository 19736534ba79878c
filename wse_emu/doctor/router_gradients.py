"""What trains a router: the size of its gradient, apart for the model's own loss and for the one that asks for even use of experts.

With one expert a token and weights divided by their sum, the weight is 1 whatever the router says: the model's loss sends it nothing, while
the other loss makes use look perfectly even. A balance plot does not show that; these two numbers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import InputError
from wse_emu.layers.mixture_gradients import Balance, Decision, Mixture, Rules, logits_gradient, mixture_gradients

DEAD = 1e-6
"""A router is dead where the model's loss gives less than this part of the other's gradient: our own threshold, none is published."""


@dataclass(frozen=True, slots=True)
class RouterGradients:
    """Frobenius norms of the gradient of one router's weights."""

    ce: float
    """Of the model's loss."""
    aux: float
    """Of the loss for even use of experts, its coefficient included."""

    @property
    def is_dead(self) -> bool:
        """Whether the model's loss does not train the router."""
        return self.ce <= DEAD * self.aux


def router_gradients(
    x: NDArray[np.float32], weights: Mixture, rules: Rules, decision: Decision, d_out: NDArray[np.float32], balance: Balance
) -> RouterGradients:
    """Split the gradient of a router by loss.

    Parameters
    ----------
    x, weights, rules, decision, d_out, balance
        As for `wse_emu.layers.mixture_gradients.mixture_gradients`.

    Returns
    -------
    RouterGradients

    Raises
    ------
    InputError
        If routing is not learned; and as `mixture_gradients`.
    """
    if not rules.routing.is_learned:
        raise InputError(f"`routing_algorithm` {rules.routing.routing_algorithm!r} has no router that could be trained")
    found = mixture_gradients(x, weights, rules, decision, d_out)
    aux = logits_gradient(decision, rules.routing, np.zeros_like(decision.topk_weights), balance)
    assert found.logits is not None
    sizes = [float(np.linalg.norm(x.astype(np.float64).T @ d_logits)) for d_logits in (found.logits, aux)]
    return RouterGradients(ce=sizes[0], aux=sizes[1])
