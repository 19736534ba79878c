"""Multi-head latent attention: keys and values of all heads are made of one short vector a token, which is what the cache keeps."""

from __future__ import annotations

from dataclasses import dataclass

from wse_emu.foundation.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Sizes of multi-head latent attention (MLA).

    A token's *latent* is ``norm(x @ w_kv_a)``, its *rotary key* ``rotate(x @ w_k_rope)``; both are shared by all heads. A head's key is
    ``[latent @ w_uk, rotary key]``, its value ``latent @ w_uv``, its query ``[q_nope, rotate(q_rope)]``, made of ``x`` or of a short vector
    of its own, ``norm(x @ w_q_a)``.

    References
    ----------
    DeepSeek-AI, "DeepSeek-V2: A strong, economical, and efficient mixture-of-experts language model", 2024, section 2.1.
    """

    kv_lora_rank: int
    """Elements of the latent, even: they lie on the wafer in pairs."""
    q_lora_rank: int | None = None
    """Elements of the short vector that queries are made of; None: they are made of the token itself."""
    qk_nope_head_dim: int
    """Elements of a head's query that are not rotated, even."""
    v_head_dim: int
    """Elements of a head's value, even."""
    norm_eps: float = 1e-6
    """Of the norms of the two short vectors: transformers' default, whatever ``rms_norm_eps`` says."""

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 2 or value % 2:
                raise SpecError(f"`{name}` must be an even integer >= 2, got {value!r}")
        if self.q_lora_rank is not None and (type(self.q_lora_rank) is not int or self.q_lora_rank < 1):
            raise SpecError(f"`q_lora_rank` must be an integer >= 1 or None, got {self.q_lora_rank!r}")
        if not 0 < self.norm_eps < 1:
            raise SpecError(f"`norm_eps` of `latent` must lie in (0, 1), got {self.norm_eps!r}")

    def params(self, hidden: int, num_heads: int, rope_dim: int) -> int:
        """Parameters of one layer's attention."""
        of_queries = num_heads * (self.qk_nope_head_dim + rope_dim)
        short = self.q_lora_rank
        queries = hidden * of_queries if short is None else short * (hidden + 1 + of_queries)
        keys = hidden * (self.kv_lora_rank + rope_dim) + self.kv_lora_rank
        values = self.kv_lora_rank * num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return queries + keys + values + num_heads * self.v_head_dim * hidden
