"""What a model is: shapes, constants and token ids, independent of any file and of any wafer."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from wse_emu.foundation.activations import ACTIVATIONS, Activation
from wse_emu.foundation.arguments import MAX_FLOAT32, MIN_FLOAT32, show
from wse_emu.foundation.attention_pattern import FULL, AttentionPattern
from wse_emu.foundation.biases import Biases
from wse_emu.foundation.clamped_experts import ClampedExperts
from wse_emu.foundation.errors import InputError, SpecError
from wse_emu.foundation.indexer import Indexer
from wse_emu.foundation.latent_attention import LatentAttention
from wse_emu.foundation.memory_tokens import MAX_CHUNK, MemoryTokens
from wse_emu.foundation.moe_config import MoEConfig
from wse_emu.foundation.norm_spec import NormSpec, QkNorm
from wse_emu.foundation.query_temperature import QueryTemperature
from wse_emu.foundation.rope_scaling import RopeScaling
from wse_emu.foundation.rotary_spec import RotarySpec
from wse_emu.foundation.routing_rule import MIXTRAL_ROUTING, RoutingRule, preset
from wse_emu.foundation.scales import Scales
from wse_emu.foundation.shared_experts import SharedExperts

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe", "gemma2", "gemma3_text", "dots1", "glm4_moe",
    "hunyuan_v1_moe", "ernie4_5_moe", "minimax_m2", "gpt_oss", "phimoe", "deepseek_v2", "deepseek_v3", "dbrx", "llama4_text",
    "deepseek_v32", "glm_moe_dsa",
)  # fmt: skip
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
    """Width of a dense feed-forward network."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """With `latent`, the elements of the rotary key."""
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched; None is not at all."""
    rotary: RotarySpec = field(default_factory=RotarySpec)
    norm: NormSpec = field(default_factory=NormSpec)
    qk_norm: QkNorm | None = None
    """Norm of queries and keys; None is none."""
    latent: LatentAttention | None = None
    """Keys and values made of one latent a token; None: of the token itself."""
    indexer: Indexer | None = None
    """What chooses the keys that a token attends to, with `latent`; None: they are all those that the layer's pattern admits."""
    biases: Biases = field(default_factory=Biases)
    scales: Scales = field(default_factory=Scales)
    attn_sinks: bool = False
    """Whether every query head has a learned score that no key has: it takes its share of the softmax and gives nothing."""
    clip_qkv: float | None = None
    """Queries, keys and values are held within plus and minus this; None leaves them."""
    activation: Activation = "silu"
    """What gates a feed-forward network: ``activation(x @ w_gate) * (x @ w_up)``."""
    sliding_window: int | None = None
    """Keys that a query of a sliding layer sees, itself included."""
    sliding_layers: tuple[int, ...] = ()
    """Layers with that window, ascending; the others see all keys before."""
    chunk_size: int | None = None
    """Keys of a block: a query of a chunked layer sees those of its own block, up to its own."""
    chunked_layers: tuple[int, ...] = ()
    """Layers with such blocks, ascending; none of them has a window."""
    query_temperature: QueryTemperature | None = None
    """How queries of layers without rotation grow with their position; None leaves them."""
    patterns: tuple[AttentionPattern, ...] = ()
    """Which keys the queries of each layer admit, one entry for each layer; () is what `sliding_window` says."""
    memory_tokens: MemoryTokens | None = None
    """Tokens that the model puts between the chunks of a text; None is none."""
    num_experts: int = 0
    """Experts of a layer with a mixture; 0 exactly in a dense model."""
    top_k: int = 0
    """Experts chosen per token; 0 exactly when `num_experts` is 0."""
    moe_intermediate_size: int = 0
    """Width of one expert; 0 exactly when `num_experts` is 0."""
    dense_layers: tuple[int, ...] = ()
    """Layers of a model with experts that have a dense feed-forward network instead, ascending."""
    shared_experts: SharedExperts | None = None
    """Network beside the chosen experts, in layers with a mixture."""
    clamped_experts: ClampedExperts | None = None
    """What experts do instead of `activation`, with biases; None is what `activation` says, without."""
    routing: RoutingRule = MIXTRAL_ROUTING
    """Which experts a token visits and with which weights; of no account in a dense model."""
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
        if self.scales.attention == self.query_dim**-0.5:  # one way to say it
            object.__setattr__(self, "scales", replace(self.scales, attention=None))
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
        if self.num_experts and (type(self.moe_intermediate_size) is not int or self.moe_intermediate_size <= 0):
            raise SpecError(f"`moe_intermediate_size` must be a positive integer, got {self.moe_intermediate_size!r}")
        if self.num_experts:
            self.routing.check_sizes(self.num_experts, self.top_k)
        for name in ("top_k", "moe_intermediate_size", "dense_layers"):
            if not self.num_experts and getattr(self, name):
                raise SpecError(f"`{name}` must be {'empty' if name == 'dense_layers' else 0} for a dense model, got {getattr(self, name)}")
        for name in ("sliding_layers", "chunked_layers", "dense_layers"):
            layers = getattr(self, name)
            if any(type(i) is not int or not 0 <= i < self.num_layers for i in layers) or any(a >= b for a, b in pairwise(layers)):
                raise SpecError(f"`{name}` must be ascending layers in 0..{self.num_layers - 1}, got {layers}")
        if self.num_experts and len(self.dense_layers) == self.num_layers:
            raise SpecError("`dense_layers` names every layer: a model without a mixture has `num_experts` 0")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            raise SpecError(f"`sliding_window` must be an integer >= 1 or None, got {self.sliding_window!r}")
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise SpecError(f"`sliding_window` and `sliding_layers` belong together, got {self.sliding_window} and {self.sliding_layers}")
        if self.chunk_size is not None and (type(self.chunk_size) is not int or self.chunk_size < 1):
            raise SpecError(f"`chunk_size` must be an integer >= 1 or None, got {self.chunk_size!r}")
        if (self.chunk_size is None) != (not self.chunked_layers):
            raise SpecError(f"`chunk_size` and `chunked_layers` belong together, got {self.chunk_size} and {self.chunked_layers}")
        both = sorted(set(self.sliding_layers) & set(self.chunked_layers))
        if both:
            raise SpecError(f"`sliding_layers` and `chunked_layers` both name layer {both[0]}: a layer has a window or blocks")
        self._check_rules()
        if self.patterns and len(self.patterns) != self.num_layers:
            raise SpecError(f"`patterns` must have one entry for each of {self.num_layers} layers, got {len(self.patterns)}")
        for layer, pattern in enumerate(self.patterns):
            if pattern.heads and len(pattern.heads) != self.num_heads:
                raise SpecError(
                    f"layer {layer}: `heads` of its attention pattern must have one entry for each of {self.num_heads} query heads, "
                    f"got {len(pattern.heads)}"
                )
        kind = None if self.rope_scaling is None else self.rope_scaling.kind
        if kind == "yarn" and not self.rope_theta > 1:
            raise SpecError(f"rotary scaling yarn: `rope_theta` must be above 1, got {self.rope_theta!r}")
        if kind == "dynamic" and self.head_dim < 4:
            raise SpecError(f"rotary scaling dynamic: `head_dim` must be at least 4, got {self.head_dim}")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, ())
            half = self.rotary.rotated(self.head_dim) // 2
            if factors and len(factors) != half:
                raise SpecError(f"rotary scaling: `{name}` must hold {half} numbers (half of what is rotated), holds {len(factors)}")

    def _check_latent(self) -> None:
        if self.num_kv_heads != self.num_heads:
            raise SpecError(f"`num_kv_heads` must be `num_heads` ({self.num_heads}) with `latent`, got {self.num_kv_heads}")
        without = {
            "qk_norm": self.qk_norm, "clip_qkv": self.clip_qkv, "attn_sinks": self.attn_sinks or None, "dim of rotary": self.rotary.dim,
            "skipped_layers of rotary": self.rotary.skipped_layers or None, "local_theta of rotary": self.rotary.local_theta,
            "qkv of biases": self.biases.qkv or None, "query_temperature": self.query_temperature,
        }  # fmt: skip
        for name, value in without.items():
            if value is not None:
                raise SpecError(f"`{name}` does not go with `latent`, got {value!r}")

    def _check_indexer(self, indexer: Indexer) -> None:
        if self.latent is None or self.latent.q_lora_rank is None:
            raise SpecError("`indexer` needs `latent` with a `q_lora_rank`: its queries are made of that short vector")
        if indexer.head_dim < self.head_dim:
            raise SpecError(
                f"`head_dim` of `indexer` must be at least that of the rotary key ({self.head_dim}), which is rotated alike; "
                f"got {indexer.head_dim}"
            )
        if indexer.shared_layers and indexer.shared_layers[-1] >= self.num_layers:
            raise SpecError(f"`shared_layers` of `indexer` must lie in 1..{self.num_layers - 1}, got {indexer.shared_layers}")
        if self.sliding_layers or self.chunked_layers or self.patterns:
            raise SpecError("`indexer` chooses among all keys: the layers have no window, no chunks and no pattern of their own")

    def _check_memory(self, memory: MemoryTokens) -> None:
        without = {
            "num_experts": self.num_experts or None, "latent": self.latent, "skipped_layers of rotary": self.rotary.skipped_layers or None,
        }  # fmt: skip
        for name, value in without.items():
            if value is not None:
                raise SpecError(f"`{name}` does not go with `memory_tokens`, got {value!r}")
        if memory.memory_token_id >= self.vocab_size:
            raise SpecError(f"memory tokens: `memory_token_id` must lie in 0..{self.vocab_size - 1}, got {memory.memory_token_id}")
        if not memory.add_chunked_attn_mask:
            return
        if self.context_length > MAX_CHUNK * memory.attn_memory_chunk_size:
            rule = f"at least {-(-self.context_length // MAX_CHUNK)} for a context of {self.context_length} tokens"
            raise SpecError(f"memory tokens: `attn_memory_chunk_size` must be {rule}, got {memory.attn_memory_chunk_size}")
        others = any(pattern != memory.pattern for pattern in self.patterns)
        for name, there in (("sliding_window", self.sliding_window), ("chunk_size", self.chunk_size), ("patterns", others or None)):
            if there is not None:
                raise SpecError(f"`{name}` does not go with `add_chunked_attn_mask` of `memory_tokens`, which is the pattern of all layers")

    def _check_rules(self) -> None:
        if self.memory_tokens is not None:
            self._check_memory(self.memory_tokens)
        if self.latent is not None:
            self._check_latent()
        if self.indexer is not None:
            self._check_indexer(self.indexer)
        if self.rotary.rotated(self.head_dim) > self.head_dim:
            raise SpecError(f"`dim` of `rotary` must be at most `head_dim` ({self.head_dim}), got {self.rotary.dim}")
        if self.rotary.skipped_layers and self.rotary.skipped_layers[-1] >= self.num_layers:
            raise SpecError(f"`skipped_layers` of `rotary` must lie in 0..{self.num_layers - 1}, got {self.rotary.skipped_layers}")
        if self.rotary.local_theta is not None and self.sliding_window is None:
            raise SpecError("`local_theta` of `rotary` is for layers with a sliding window: `sliding_window` must be given")
        if self.activation not in ACTIVATIONS:
            raise SpecError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.clip_qkv is not None and not MIN_FLOAT32 <= self.clip_qkv <= MAX_FLOAT32:
            raise SpecError(f"`clip_qkv` must be positive, in float32, or None, got {self.clip_qkv!r}")
        if self.shared_experts is not None and not self.num_experts:
            raise SpecError("`shared_experts` must be None for a dense model")
        if self.clamped_experts is not None and not self.num_experts:
            raise SpecError("`clamped_experts` must be None for a dense model")

    @property
    def is_moe(self) -> bool:
        """Whether there are layers with a mixture of experts."""
        return self.num_experts > 0

    @property
    def n_slots(self) -> int:
        """Most experts that a token visits; 0 in a dense model."""
        return self.routing.slots(self.num_experts, self.top_k) if self.is_moe else 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward network of a layer is a mixture of experts."""
        return self.is_moe and not _holds(self.dense_layers, layer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with a mixture of experts, ascending."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))

    def ffn_width(self, layer: int) -> int:
        """Width of a layer's feed-forward network, or of one of its experts."""
        return self.moe_intermediate_size if self.is_moe_layer(layer) else self.intermediate_size

    def window(self, layer: int) -> int | None:
        """Window that the checkpoint gives a layer, in keys, a query's own included; None is none."""
        return self.sliding_window if _holds(self.sliding_layers, layer) else None

    def chunk(self, layer: int) -> int | None:
        """Block that the checkpoint gives a layer, in keys; None is none."""
        return self.chunk_size if _holds(self.chunked_layers, layer) else None

    def pattern(self, layer: int) -> AttentionPattern:
        """Keys that the queries of a layer admit."""
        if self.patterns:
            return self.patterns[layer]
        if self.memory_tokens is not None and self.memory_tokens.add_chunked_attn_mask:
            return self.memory_tokens.pattern
        window, chunk = self.window(layer), self.chunk(layer)
        return FULL if window is None and chunk is None else AttentionPattern(window=window, chunk=chunk)

    def with_attention(
        self, attention: AttentionPattern | Sequence[AttentionPattern], dense_attention_layers: Sequence[int] = ()
    ) -> ModelSpec:
        """The same model with other patterns of attention.

        Parameters
        ----------
        attention : AttentionPattern or a sequence of them
            For all layers, or one for each.
        dense_attention_layers : sequence of int
            Layers that see every key nevertheless.

        Raises
        ------
        SpecError
            If there is not one pattern for each layer, or `dense_attention_layers` names a layer that is not there.
        """
        patterns = [attention] * self.num_layers if isinstance(attention, AttentionPattern) else list(attention)
        for i, pattern in enumerate(patterns):
            if not isinstance(pattern, AttentionPattern):
                raise SpecError(f"`attention[{i}]` must be an AttentionPattern (of a mask: `mask=...`), got {show(pattern)}")
        if len(patterns) != self.num_layers:
            raise SpecError(f"`attention` must be one pattern or one for each of {self.num_layers} layers, got {len(patterns)}")
        for layer in dense_attention_layers:
            if type(layer) is not int or not 0 <= layer < self.num_layers:
                raise SpecError(f"`dense_attention_layers` must name layers in 0..{self.num_layers - 1}, got {show(layer)}")
            patterns[layer] = FULL
        return replace(self, patterns=tuple(patterns))

    def with_sparse_layers(self, attention: AttentionPattern, layers: Sequence[int]) -> ModelSpec:
        """The same model with another pattern of attention in some layers; the others stay as they are.

        Raises
        ------
        SpecError
            If `layers` names a layer that is not there.
        """
        patterns = [self.pattern(layer) for layer in range(self.num_layers)]
        for layer in layers:
            if type(layer) is not int or not 0 <= layer < self.num_layers:
                raise SpecError(f"`layers` must name layers in 0..{self.num_layers - 1}, got {layer!r}")
            patterns[layer] = attention
        return self.with_attention(patterns)

    def with_routing(self, routing: RoutingRule | MoEConfig | str, *, learned: bool = False) -> ModelSpec:
        """The same model, with the experts that it has, under another routing rule.

        Parameters
        ----------
        routing : RoutingRule, MoEConfig or str
            The rule, or the name of one of `ROUTING_PRESETS`. A configuration also says the `top_k`; its numbers of experts must be those
            of the model.
        learned : bool
            Whether the routers' weights are there: the rule may then ask for no gate and no bias that this model's own rule has not.

        Raises
        ------
        SpecError
            If the model is dense, no preset has the name, the rule does not go with the experts and their `top_k`, the configuration
            speaks of others, or the rule asks for weights that are not there.
        """
        made = self._rerouted(routing)
        if learned:
            made.routing.check_weights(self.routing)
        return made

    def _rerouted(self, routing: RoutingRule | MoEConfig | str) -> ModelSpec:
        if not self.is_moe:
            raise SpecError(f"`routing` is for models with experts; this {self.family} model is dense")
        if isinstance(routing, MoEConfig):
            made = self.with_moe(routing)
            if made.num_experts != self.num_experts:
                raise SpecError(f"`num_experts` of the MoEConfig must be the model's, {self.num_experts}, got {routing.num_experts}")
            if made.shared_experts != self.shared_experts:
                what = f"must stand for what the model has, {self.shared_experts}, got {routing.num_shared_experts}"
                raise SpecError(f"`num_shared_experts` of the MoEConfig {what} of width {self.moe_intermediate_size}")
            return replace(self, top_k=routing.top_k, routing=routing.routing)
        rule = preset(routing) if isinstance(routing, str) else routing
        if not isinstance(rule, RoutingRule):
            raise SpecError(f"`routing` must be a RoutingRule, the name of a preset or a MoEConfig, got {show(routing)}")
        return replace(self, routing=rule)

    def with_moe(self, config: MoEConfig) -> ModelSpec:
        """The same model with the mixture that a ModelZoo configuration describes, for random weights or a new checkpoint.

        An expert has the width of one that is there, or of the dense network; shared experts have it each. A configuration of one expert
        in all makes a dense model.
        """
        if not isinstance(config, MoEConfig):
            raise SpecError(f"`config` must be a MoEConfig, got {show(config)}")
        width = self.moe_intermediate_size or self.intermediate_size
        if not config.is_moe:
            return replace(
                self, intermediate_size=self.intermediate_size if self.dense_layers else width, num_experts=0, top_k=0,
                moe_intermediate_size=0, dense_layers=(), shared_experts=None, clamped_experts=None, routing=MIXTRAL_ROUTING,
            )  # fmt: skip
        n_shared = config.num_shared_experts
        shared = None if n_shared is None else SharedExperts(intermediate_size=n_shared * width)
        return replace(
            self, num_experts=config.num_experts, top_k=config.top_k, moe_intermediate_size=width, shared_experts=shared,
            routing=config.routing,
        )  # fmt: skip

    @property
    def context_length(self) -> int:
        """Longest sequence the model is meant for: its positions, or what a rotary scaling makes of the original ones.

        Memory tokens come on top: there are positions for them too (`positions_with_memory`).
        """
        stretched = 0 if self.rope_scaling is None else self.rope_scaling.context_length
        return max(self.max_position_embeddings, stretched)

    @property
    def most_tokens(self) -> int:
        """Longest text that the model has positions for, and that its patterns of attention describe."""
        described = min((n for pattern in self.patterns if (n := pattern.n_positions) is not None), default=None)
        if described is None:
            return self.context_length
        return bisect_right(range(self.context_length + 1), described, key=self.sequence_length) - 1

    def check_length(self, n_prompt: int, new_tokens: int) -> None:
        """Refuse a text that is longer than `most_tokens`.

        Raises
        ------
        InputError
        """
        most = self.most_tokens
        if n_prompt + new_tokens > most:
            limit = f"model's {most} positions" if most == self.context_length else f"{most} tokens that its patterns of attention describe"
            raise InputError(f"{show(n_prompt)} tokens of prompt and {show(new_tokens)} new ones are more than the {limit}")

    def sequence_length(self, n: int) -> int:
        """Tokens of a sequence with `n` of the text: its memory tokens too, if the model has any."""
        return n if self.memory_tokens is None else self.memory_tokens.length(n)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """Prefixes of the projections around attention: "" and, of memory tokens that have weights of their own, "memory."."""
        own = self.memory_tokens is not None and self.memory_tokens.add_qkv_memory_weights
        return ("", "memory.") if own else ("",)

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding in MemoryX: the vocabulary's and, last, that of memory tokens that have one of their own."""
        return self.vocab_size + (self.memory_tokens is not None and self.memory_tokens.add_extra_embedding)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_dim(self) -> int:
        """Elements of a query and of the key that it meets."""
        return self.head_dim if self.latent is None else self.latent.qk_nope_head_dim + self.head_dim

    @property
    def value_dim(self) -> int:
        """Elements of a head's value, and of what attention gives for it."""
        return self.head_dim if self.latent is None else self.latent.v_head_dim

    @property
    def cached_heads(self) -> int:
        """Key/value heads as the cache keeps them: one with `latent`."""
        return self.num_kv_heads if self.latent is None else 1

    def qkv_suffixes(self, layer: int) -> tuple[str, ...]:
        """What happens to queries and keys after their projection, in order, of "_norm", "_clip", "_rope" and "_tuned".

        To values only "_clip" happens, "_tuned" (`query_temperature`) to queries only.
        """
        norm = () if self.qk_norm is None or (self.qk_norm.rotated_only and not self.rotates(layer)) else ("_norm",)
        late = self.qk_norm is not None and self.qk_norm.after_rotary
        clip = () if self.clip_qkv is None else ("_clip",)
        rope = ("_rope",) if self.rotates(layer) else ()
        tuned = () if self.query_temperature is None or self.rotates(layer) else ("_tuned",)
        return (*clip, *rope, *norm, *tuned) if late else (*norm, *clip, *rope, *tuned)

    def rotates(self, layer: int) -> bool:
        """Whether a layer's queries and keys are rotated."""
        return not _holds(self.rotary.skipped_layers, layer)

    def rotates_locally(self, layer: int) -> bool:
        """Whether a layer turns by ``rotary.local_theta``."""
        return self.rotary.local_theta is not None and self.window(layer) is not None

    def runs_indexer(self, layer: int) -> bool:
        """Whether a layer chooses by an indexer of its own which keys its tokens attend to."""
        return self.indexer is not None and self.indexer.runs_in(layer)

    @property
    def indexer_layers(self) -> tuple[int, ...]:
        """Layers with an indexer of their own, ascending."""
        return tuple(layer for layer in range(self.num_layers) if self.runs_indexer(layer))

    @property
    def attention_scale(self) -> float:
        """Factor of the scores."""
        return float(self.query_dim**-0.5) if self.scales.attention is None else self.scales.attention

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        h, n_q, n_kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * h * (n_q + n_kv) if self.latent is None else self.latent.params(h, self.num_heads, self.head_dim)
        short = 0 if self.latent is None else self.latent.q_lora_rank or 0
        indexers = 0 if self.indexer is None else len(self.indexer_layers) * self.indexer.params(h, short)
        attention += self.biases.qkv * (n_q + 2 * n_kv) + self.biases.out * h
        attention *= len(self.weight_sets)
        if self.qk_norm is not None and self.qk_norm.weighted:
            attention += 2 * self.head_dim if self.qk_norm.over == "head" else n_q + n_kv
        attention += self.num_heads * self.attn_sinks
        n_moe = len(self.moe_layers)
        dense = (self.num_layers - n_moe) * 3 * h * self.intermediate_size
        of_biases = 0 if self.clamped_experts is None else 2 * self.moe_intermediate_size + h
        experts = n_moe * self.num_experts * (3 * h * self.moe_intermediate_size + of_biases)
        if self.shared_experts is not None:
            experts += n_moe * h * (3 * self.shared_experts.intermediate_size + self.shared_experts.gated)
        norms, per_norm = 4 if self.norm.after else 2, h * (1 + self.norm.bias)
        routers = n_moe * self.num_experts * self.routing.params_per_expert(h)
        vocab = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        vocab += self.vocab_size * self.biases.head + (self.embedding_rows - self.vocab_size) * h
        return self.num_layers * (attention + norms * per_norm) + indexers + dense + experts + routers + per_norm + vocab


def _holds(layers: tuple[int, ...], layer: int) -> bool:
    """Whether an ascending tuple holds a layer."""
    at = bisect_left(layers, layer)
    return at < len(layers) and layers[at] == layer
