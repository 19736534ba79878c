"""How a model's program is run; of all options only `precision` changes values of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import InputError, SpecError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.layers.ffn import MoeImplementation
from wse_emu.layers.key_rows import KvGrowth, check_growth
from wse_emu.layers.linear import DEFAULT_CHUNK

KvKeeping = Literal["store", "recompute"]
StreamExperts = Literal["activated", "all"]
CHUNKS = (DEFAULT_CHUNK, 16, 8, 4, 2)
"""Sizes of streamed pieces that are tried in turn: smaller ones need less SRAM and more messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How the program is run; of all options only `precision` changes values of the result."""

    stream_experts: StreamExperts = "activated"
    """Stream only experts that some token chose, or all."""
    chunk: int | None = None
    """Most output columns of one streamed piece of a matrix; None takes the largest of `CHUNKS` that fits (see `wse_emu.engine.plan`)."""
    moe_implementation: MoeImplementation = "experimental"
    """How experts find their tokens: "functional" computes every expert for every token, then masks; "experimental" searches each row's
    tokens expert by expert; "optimized" sorts them once. The bits are the same, work, messages and SRAM are not."""
    prefetch_depth: int = 1
    """Layers made resident ahead of use; 0 starts no thread."""

    bta_max_tile: int | None = None
    """Batch tiling on attention: sequences of the batch that go through attention together; None is all. Experts still see all tokens at
    once. A smaller tile needs less SRAM in attention, and streams its weights once for each tile. It must divide the batch."""

    kv_growth: KvGrowth = "shift"
    """Where keys and values of new tokens go: "shift" keeps all rows of cores balanced by moving older tokens up; "concat" moves nothing
    and puts all that is generated on the last row, as a baseline to compare with: that row fills up first and works longest."""

    kv: KvKeeping = "store"
    """What is kept of a token for later ones: "store" keeps its keys and values in every layer; "recompute" keeps what they are made of,
    the normalised residual stream (``hidden_size`` numbers in place of ``2 * num_kv_heads * head_dim``), and makes them anew in every pass
    for one layer at a time. That saves SRAM where key/value heads are many, and costs multiply-adds and the stream of their columns."""

    skip_zero_weights: bool = False
    """Leave weights of matrices that are zero (all bits; not -0) behind when they stream: their bytes and wavelets are not sent, and
    messages without any other. A core finds zeros in their places and computes what it always does, so no value changes, be an activation
    infinite or NaN. The matrix of a router is always sent whole. Without values (the ``dry`` executor, plans) everything counts."""
    precision: Precision = FLOAT32
    """Number formats of what lies in SRAM."""

    def __post_init__(self) -> None:
        if not isinstance(self.precision, Precision):
            raise SpecError(f"`precision` must be a Precision, got {show(self.precision)}")
        if type(self.skip_zero_weights) is not bool:
            raise SpecError(f"`skip_zero_weights` must be True or False, got {show(self.skip_zero_weights)}")
        if not isinstance(self.stream_experts, str) or self.stream_experts not in ("activated", "all"):
            raise SpecError(f"`stream_experts` must be 'activated' or 'all', got {show(self.stream_experts)}")
        check_growth(self.kv_growth)
        if not isinstance(self.kv, str) or self.kv not in get_args(KvKeeping):
            raise SpecError(f"`kv` must be 'store' or 'recompute', got {show(self.kv)}")
        if self.moe_implementation not in get_args(MoeImplementation):
            known = ", ".join(get_args(MoeImplementation))
            raise SpecError(f"`moe_implementation` must be one of {known}, got {self.moe_implementation!r}")
        if self.chunk is not None and (type(self.chunk) is not int or self.chunk < 2):
            raise SpecError(f"`chunk` must be an integer >= 2 or None, got {show(self.chunk)}")
        if self.bta_max_tile is not None and (type(self.bta_max_tile) is not int or self.bta_max_tile < 1):
            raise SpecError(f"`bta_max_tile` must be an integer >= 1 or None, got {show(self.bta_max_tile)}")
        if type(self.prefetch_depth) is not int or self.prefetch_depth < 0:
            raise SpecError(f"`prefetch_depth` must be an integer >= 0, got {show(self.prefetch_depth)}")

    def check_model(self, spec: ModelSpec) -> None:
        """Raise `SpecError` if a model cannot be run so: experts' inputs scaled where all are computed, keys that inputs do not tell."""
        if spec.is_moe and spec.routing.probability_before_ffn and self.moe_implementation == "functional":
            raise SpecError(
                "`moe_implementation` 'functional' computes every expert for every token, which has no weight to multiply its input by: "
                "with `probability_before_ffn` use 'experimental' or 'optimized'"
            )
        if self.kv == "store":
            return
        if spec.latent is not None:
            raise SpecError("`kv` 'recompute' does not go with latent attention: what is kept there is one short latent a token already")
        if spec.rope_scaling is not None and spec.rope_scaling.follows_length:
            raise SpecError(
                f"`kv` 'recompute' does not go with rotary scaling {spec.rope_scaling.kind}: a key keeps the rotation of the length at "
                "which it came, which its input does not tell"
            )

    def check_batch(self, n_sequences: int) -> None:
        """Raise `InputError` if tiles of attention do not divide a batch."""
        if self.bta_max_tile is not None and n_sequences % self.bta_max_tile:
            raise InputError(f"`bta_max_tile` must divide the batch, got tiles of {self.bta_max_tile} and {n_sequences} sequences")

    @property
    def piece(self) -> int:
        """Columns of a streamed piece, with the default filled in."""
        return DEFAULT_CHUNK if self.chunk is None else self.chunk
