"""A mistake, what it is made in, and the list of all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from golden_models import Config, chooses_keys, is_llama4
from golden_oracle import network, router_of
from torch import nn

HEAD_NORMS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}
"""Norms of queries and keys, and their other names."""


@dataclass(frozen=True)
class Subject:
    """A loaded model, about to be spoilt."""

    model: Any
    config: Config
    undo: ExitStack

    @property
    def attentions(self) -> list[Any]:
        """Attention modules of all layers."""
        return [layer.self_attn for layer in self.model.model.layers]

    @property
    def dense(self) -> list[Any]:
        """Dense feed-forward modules."""
        return [network(layer) for layer in self.model.model.layers if router_of(layer) is None]

    @property
    def sparse(self) -> list[Any]:
        """Mixture-of-experts modules."""
        return [network(layer) for layer in self.model.model.layers if router_of(layer) is not None]

    @property
    def routers(self) -> list[Any]:
        """Routers of all mixtures."""
        return [router for router in map(router_of, self.model.model.layers) if router is not None]

    @property
    def rotary(self) -> Any:
        """Rotary module that the call at hand uses."""
        return self.model.model.rotary_emb

    def norms(self, name: str) -> list[Any]:
        """Norms by the name they have in a layer, in its attention, or at the end."""
        if name in HEAD_NORMS:
            return [getattr(attention, self.head_norm(attention, name)) for attention in self.attentions]
        holders = [self.model.model] if name == "norm" else self.model.model.layers
        return [getattr(holder, name) for holder in holders]

    @staticmethod
    def head_norm(attention: Any, name: str) -> str:
        """What a family calls ``q_norm`` or ``k_norm``."""
        return name if hasattr(attention, name) else HEAD_NORMS[name]

    def take_head_norms(self, attention: Any) -> tuple[Any, Any]:
        """Norms of an attention module's queries and keys, which are left out from now on."""
        names = [self.head_norm(attention, name) for name in HEAD_NORMS]
        q_norm, k_norm = (getattr(attention, name) for name in names)
        for name in names:
            setattr(attention, name, nn.Identity())
        return q_norm, k_norm

    @property
    def shared(self) -> list[Any]:
        """Shared experts of all mixtures."""
        return [getattr(m, name) for m in self.sparse for name in ("shared_expert", "shared_experts", "shared_mlp") if hasattr(m, name)]

    def turn(self, wrong: Callable[[Any], Any]) -> None:
        """Put ``wrong(right)`` in the place of the rotation, both taking queries, keys, cosines and sines, (b, t, rotated elements)."""
        module = sys.modules[type(self.model).__module__]
        if not hasattr(module, "apply_rotary_emb"):
            apart = self.config.get("rope_interleave", False) or chooses_keys(self.config)
            self.replace("apply_rotary_pos_emb" + "_interleave" * apart, lambda right: self._of_attention(right, wrong))
            return

        def adapted(right: Any) -> Any:  # one complex number for each pair
            def placed(*heads: Any) -> tuple[Any, ...]:  # Llama 4 has heads behind tokens
                return tuple(x.transpose(1, 2) for x in heads) if is_llama4(self.config) else heads

            def usual(q: Any, k: Any, cos: Any, sin: Any) -> Any:
                half = cos.shape[-1] // 2
                return placed(*right(*placed(q, k), torch.complex(cos[..., :half], sin[..., :half])))

            def call(q: Any, k: Any, freqs: Any) -> Any:
                parts = (torch.cat((part, part), -1) for part in (freqs.real, freqs.imag))
                return placed(*wrong(usual)(*placed(q, k), *parts))

            return call

        self.replace("apply_rotary_emb", adapted)

    @staticmethod
    def _of_attention(right: Any, wrong: Callable[[Any], Any]) -> Any:
        """``wrong(right)``, but for indexers' queries and keys, whose heads lie behind tokens."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return right(*args, **kwargs) if kwargs.get("unsqueeze_dim") == 2 else wrong(right)(*args, **kwargs)

        return call

    def replace(self, name: str, wrong: Callable[[Any], Any]) -> None:
        """Put ``wrong(right)`` in the place of a function of the family's module."""
        module = sys.modules[type(self.model).__module__]
        self.undo.enter_context(mock.patch.object(module, name, wrong(getattr(module, name))))


@dataclass(frozen=True)
class Mistake:
    """One thing done wrong."""

    name: str
    applies: Callable[[Config], bool]
    changes: Callable[[Config], Config]
    """What config.json would have to say."""
    spoil: Callable[[Subject], None]


MISTAKES: list[Mistake] = []
"""In the order of the table."""


def always(_: Config) -> bool:
    """Every file."""
    return True


def misread(name: str, applies: Callable[[Config], bool], changes: Callable[[Config], Config]) -> None:
    """Add a mistake that amounts to another config.json."""
    MISTAKES.append(Mistake(name, applies, changes, lambda subject: None))


def mistake(name: str, applies: Callable[[Config], bool] = always) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a mistake that is made in a loaded model."""

    def add(spoil: Callable[[Subject], None]) -> Callable[[Subject], None]:
        MISTAKES.append(Mistake(name, applies, lambda config: {}, spoil))
        return spoil

    return add


def not_gemma(config: Config) -> bool:
    """Every other family."""
    return not is_gemma(config)


def is_gemma(config: Config) -> bool:
    """Whether weights of norms mean ``1 + w`` and the halves of a layer are normalised before and after."""
    return bool(config["model_type"].startswith("gemma"))


def is_clamped(config: Config) -> bool:
    """Whether experts have biases and a clamped gate."""
    return "swiglu_limit" in config


def is_dbrx(config: Config) -> bool:
    """Whether matrices are fused, and config.json nested, as in DBRX."""
    return bool(config["model_type"] == "dbrx")
