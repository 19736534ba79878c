"""Mistakes one can make in a transformer, each as a change of config.json or of a model that transformers has loaded."""

from golden_mistakes import rotary, attention, latent, index, llama4, norms, scales, quantized, network, experts, head  # noqa: I001  in the order of the table
from golden_mistakes.subject import MISTAKES, Mistake, Subject

__all__ = [
    "MISTAKES", "Mistake", "Subject", "attention", "experts", "head", "index", "latent", "llama4", "network", "norms", "quantized",
    "rotary", "scales",
]  # fmt: skip
