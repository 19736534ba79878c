"""What a model is: shapes, constants and token ids, independent of any file and of any wafer."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.errors import SpecError

FAMILIES = ("llama", "mixtral")
"""Model families (Hugging Face ``model_type``) that this version runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Shape of one decoder-only transformer; valid from birth.

    Names are those of Hugging Face ``config.json`` or its field's standard terms.
    """

    family: str
    """Hugging Face ``model_type``, one of `FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the (expert) feed-forward network."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    num_experts: int = 0
    """Experts per layer; 0 is a dense feed-forward network."""
    top_k: int = 0
    """Experts chosen per token; 0 exactly when `num_experts` is 0."""
    renormalize: bool = True
    """Whether the chosen experts' weights are divided by their sum."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise SpecError(f"`family` must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        positive = (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise SpecError(f"`{name}` must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"`num_heads` must be a multiple of `num_kv_heads`, got {self.num_heads} and {self.num_kv_heads}")
        if self.head_dim % 2:
            raise SpecError(f"`head_dim` must be even (rotary pairs), got {self.head_dim}")
        if not 0 < self.rms_norm_eps < 1:
            raise SpecError(f"`rms_norm_eps` must lie in (0, 1), got {self.rms_norm_eps!r}")
        if not 0 < self.rope_theta < float("inf"):
            raise SpecError(f"`rope_theta` must be positive and finite, got {self.rope_theta!r}")
        if self.num_experts < 0:
            raise SpecError(f"`num_experts` must be >= 0, got {self.num_experts}")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise SpecError(f"`top_k` must lie in 1..{self.num_experts} (`num_experts`), got {self.top_k}")
        if not self.num_experts and self.top_k:
            raise SpecError(f"`top_k` must be 0 for a dense model, got {self.top_k}")

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward networks are mixtures of experts."""
        return self.num_experts > 0

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        h = self.hidden_size
        attention = h * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        ffn = 3 * h * self.intermediate_size
        block = attention + 2 * h + (self.num_experts * (ffn + h) if self.is_moe else ffn)
        return self.num_layers * block + h + self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
