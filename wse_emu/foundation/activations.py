"""What gates a feed-forward network."""

from __future__ import annotations

from typing import Literal, get_args

Activation = Literal["silu", "gelu_tanh"]
"""``silu(x) = x sigmoid(x)``; ``gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel, 2016)."""

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
