"""Each stage's formula in float64, applied to the inputs that the run itself had, with the bound that the run must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from wse_emu.equivalence import local_latent, rounded_softmax, tolerance
from wse_emu.equivalence.local_index import index_stage
from wse_emu.equivalence.local_latent import latent_stage
from wse_emu.equivalence.products import Products
from wse_emu.equivalence.routing_bounds import expert_weights_bound, shares_error, together_scores
from wse_emu.equivalence.stages import attended, chosen_in, inputs_of, is_stored, of_heads
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import formulas, rotary, routing, tensors
from wse_emu.reference.storage import rounded
from wse_emu.reference.weights import PublishedWeights

F64 = NDArray[np.float64]
Bounded = tuple[F64, F64]
"""Exact value and bound of the error, of one shape."""

SCORES = ("router_logits", "shared_gate")
"""Products whose sums are float32 whatever the precision, beside the logits."""


class StageLocal:
    """Expected value and bound of every stage of a record; see `check`.

    Parameters
    ----------
    record : TapRecord
        Stages of the right shape and dtype only.
    read : callable
        Name to published tensor.
    precision : Precision
        Formats in which the run stored its stages, keys and values.
    """

    def __init__(
        self, record: TapRecord, spec: ModelSpec, read: Callable[[str], NDArray[Any]], precision: Precision = FLOAT32
    ) -> None:
        self._record = record
        self._precision = precision
        self._spec = spec
        self._read = read
        self._weights = PublishedWeights(spec, read, np.dtype(np.float64))
        self._products = Products(record, spec, precision)
        memory = spec.memory_tokens
        self._memory = np.zeros(len(record.pos), np.bool_) if memory is None else formulas.are_memory(memory, record.pos)
        kinds = {spec.rotates_locally(i) for i in range(spec.num_layers)}
        self._angles = {local: rotary.rotary_angles(spec, record.seq, record.pos, local=local) for local in kinds}
        self._attention: tuple[int, dict[str, Bounded]] | None = None

    def check(self, layer: int | None, name: str) -> Bounded:
        """Expected value and bound of one stage ("topk_ids" excepted: those are compared as sets, see `routing`).

        All of the stage's inputs must be in the record. What is exact before it is stored must be exact after.
        """
        value, bound = self._computed(layer, name)
        return self._stored(value, bound) if is_stored(name) else (value, bound)

    def _stored(self, value: F64, bound: F64) -> Bounded:
        """What is known to `bound`, after it was stored."""
        dtype = self._precision.dtype
        if dtype == "float32":
            return value, bound
        if not bound.any():
            return rounded(value, dtype).astype(np.float64), bound
        return value, tolerance.stored_bound(value, bound, dtype)

    def _computed(self, layer: int | None, name: str) -> Bounded:
        """The same before the stage's last write."""
        spec = self._spec
        if name == "embedding":  # a row of the published table, as it is: nothing may differ
            rows = self._read(tensors.embed_tokens(spec).name)[self._record.token_ids]
            if spec.memory_tokens is not None and spec.memory_tokens.add_extra_embedding:
                rows = np.where(self._memory[:, None], self._read(tensors.memory_embedding(spec).name), rows)
            if spec.scales.embedding != 1:  # times the factor, rounded once
                rows = (rows.astype(np.float64) * float(np.float32(spec.scales.embedding))).astype(np.float32)
            exact = rows.astype(np.float64)
            return exact, np.zeros_like(exact)
        if name in ("attn_norm", "attn_after_norm", "ffn_norm", "ffn_after_norm", "final_norm"):
            return self._norm(self._inputs(layer, name)[0], layer, name)
        if name == "logits":
            return self._logits(self._inputs(layer, name)[0])
        assert layer is not None
        return self._check_in_layer(layer, name)

    def _check_in_layer(self, layer: int, name: str) -> Bounded:
        spec = self._spec
        mixed = "attn_context" if spec.latent is None else "attn_latent"
        if name in ("attn_max", "attn_denominator", mixed):
            if self._attention is None or self._attention[0] != layer:
                self._attention = (layer, self._attend(layer))
            return self._attention[1][name]
        inputs = self._inputs(layer, name)
        x = inputs[0]
        of_index = index_stage(self._record, spec, self._weights, self._products, layer, name, inputs, self._precision)
        if of_index is not None:
            return of_index
        of_latent = latent_stage(self._record, spec, self._weights, self._products, layer, name, inputs)
        if of_latent is not None:
            return of_latent
        if name in ("q", "k", "v", "attn_out", "router_logits", "shared_gate"):
            role = {"q": "w_q", "k": "w_k", "v": "w_v", "attn_out": "w_o", "router_logits": "router", "shared_gate": "shared_gate"}[name]
            if name in SCORES:
                value, bound = self._scores(x, tensors.layer_tensor(spec, layer, role))
            else:
                value, bound = self._projected(layer, name, x, role)
                for kind in spec.weight_sets[1:]:  # memory tokens have their own
                    own = self._projected(layer, name, x[self._memory], kind + role)
                    value[self._memory], bound[self._memory] = own
            if role == "router" and spec.routing.router_use_bias:
                value = value + self._vector(layer, "router_bias")
                bound = bound + tolerance.add_bound(value)
            shape = (len(x), -1, spec.head_dim) if name in ("q", "k", "v") else value.shape
            return value.reshape(shape), bound.reshape(shape)
        if of_heads(name):
            return self._after_projection(layer, name, x)
        if name in ("attn_residual", "layer_out"):
            scale = spec.scales.residual
            if scale == 1 and self._precision.dtype != "float32":  # one sum of float32 numbers: nothing may differ
                exact = (x.astype(np.float32) + inputs[1].astype(np.float32)).astype(np.float64)
                return exact, np.zeros_like(exact)
            total = x + scale * inputs[1]
            return total, tolerance.add_bound(total) if scale == 1 else tolerance.scaled_add_bound(total, scale * inputs[1])
        if name == "router_scores":
            return together_scores(x, self._record.together, spec.routing, self.correction(layer))
        if name == "topk_weights":
            ids = self._record.stages[layer, "topk_ids"]
            if not spec.routing.is_learned:
                weights = np.full(ids.shape, spec.routing.routed_scaling_factor / spec.top_k)
                return weights, 2 * tolerance.U * weights
            together = self._record.together
            of, error = routing.shares(x, together, spec.routing), shares_error(x, together, spec.routing)
            weights = routing.weights(of, ids, spec.routing).astype(np.float64)
            return weights, expert_weights_bound(of, ids, spec.routing, error).astype(np.float64)
        if name == "ffn_out" and spec.is_moe_layer(layer):
            _, weights, outs, *shared = inputs
            weights = np.ones_like(weights) if spec.routing.probability_before_ffn else weights
            value = np.einsum("tk,tkh->th", weights, outs)
            if shared:
                value = value + shared[0] * (expit(shared[1]) if len(shared) > 1 else 1.0)
            return value, tolerance.combine_bound(weights, outs, *shared)
        if name in ("ffn_hidden", "shared_hidden"):
            return self._glu(layer, x, None if name == "ffn_hidden" else "shared")
        if name == "shared_out":
            return self._linear("shared_hidden", x, tensors.layer_tensor(spec, layer, "w_down", "shared"))
        if name == "ffn_out":
            return self._linear("ffn_hidden", x, tensors.layer_tensor(spec, layer, "w_down"))
        return self._chosen_experts(layer, name, x)

    def _projected(self, layer: int, name: str, x: F64, role: str) -> Bounded:
        """Queries, keys, values or the output of attention, with their bias."""
        spec = self._spec
        value, bound = self._linear(self._input(layer, name), x, tensors.layer_tensor(spec, layer, role))
        if spec.biases.out if name == "attn_out" else spec.biases.qkv:
            bound = self._stored(value, bound)[1]  # the product is written, then the sum
            value = value + self._weights.layer(layer, role.replace("w_", "b_"))
            bound = bound + tolerance.add_bound(np.abs(value) + bound)
        return value, bound

    def _norm(self, x: F64, layer: int | None, name: str) -> Bounded:
        """A norm of the residual stream."""
        if self._spec.norm.kind == "rms":
            return self._rms_norm(x, layer, name)
        weight, added = self._weights.norm(layer, name), self._weights.norm_bias(layer, name)
        bias = None if added is None else added.astype(np.float64)
        eps = self._spec.rms_norm_eps
        value = formulas.layer_norm(x, weight, None, eps).astype(np.float64)
        bound = tolerance.layer_norm_bound(x, weight.astype(np.float64), eps)
        if bias is None:
            return value, bound
        bound = self._stored(value, bound)[1]  # written, then the bias is added
        return value + bias, bound + tolerance.add_bound(np.abs(value + bias) + bound)

    def _rms_norm(self, x: F64, layer: int | None, name: str) -> Bounded:
        norm = formulas.rms_norm(x, self._weights.norm(layer, name), self._spec.rms_norm_eps).astype(np.float64)
        return norm, tolerance.rms_norm_bound(norm, unit_offset=self._spec.norm.unit_offset)

    def _logits(self, x: F64) -> Bounded:
        """Head, its constant divisor (each weight is divided by it and rounded) and the cap."""
        scales, head = self._spec.scales, tensors.lm_head(self._spec)
        value, bound = self._scores(x, head)
        if self._spec.biases.head:
            added = self._weights.raw(tensors.lm_head_bias(self._spec)).astype(np.float64)
            value, bound = value + added, bound + tolerance.add_bound(np.abs(value + added) + bound)
            if scales.logits != 1:
                bound = bound + tolerance.U * np.abs(added)
        if scales.logits != 1:
            rounded = tolerance.U * tolerance.magnitude_product(x, self._weights.raw(head))
            value, bound = value / scales.logits, (bound + 2 * rounded) / scales.logits
        if scales.logits_cap is None:
            return value, bound
        cap = float(np.float32(scales.logits_cap))
        return cap * np.tanh(value / cap), tolerance.capped_bound(value, bound, cap)

    def _after_projection(self, layer: int, name: str, x: F64) -> Bounded:
        """Queries, keys or values (T, heads, d) normalised, limited or rotated."""
        spec = self._spec
        if name.endswith("_clip"):
            assert spec.clip_qkv is not None
            limit = float(np.float32(spec.clip_qkv))
            held = np.clip(x, -limit, limit)
            return held, np.zeros_like(held)
        if name.endswith("_rope"):
            (angles, factor), interleaved = self._angles[spec.rotates_locally(layer)], spec.rotary.interleaved
            rotated = formulas.rotate(x, angles, factor, interleaved=interleaved).astype(np.float64)
            return rotated, tolerance.rotary_bound(x, angles, factor, interleaved=interleaved)
        if name.endswith("_tuned"):
            assert spec.query_temperature is not None
            factor = formulas.temperature(spec.query_temperature, self._record.pos)[:, None, None]
            return x * factor, tolerance.tuned_bound(x * factor, factor)
        assert spec.qk_norm is not None
        rows = x if spec.qk_norm.over == "head" else x.reshape(len(x), -1)
        norm, bound = self._rms_norm(rows, layer, name)
        return norm.reshape(x.shape), bound.reshape(x.shape)

    def _chosen_experts(self, layer: int, name: str, x: F64) -> Bounded:
        """Check "expert_hidden" or "expert_out", for the (token, slot) pairs that chose each expert."""
        spec = self._spec
        ids = self._record.stages[layer, "topk_ids"]
        width = spec.moe_intermediate_size if name == "expert_hidden" else spec.hidden_size
        value, bound = np.zeros((*ids.shape, width)), np.zeros((*ids.shape, width))
        for expert in np.unique(ids[ids >= 0]):
            at = np.nonzero(ids == expert)
            if name == "expert_hidden":
                value[at], bound[at] = self._glu(layer, self._entering(layer, x, at), int(expert))
            else:
                value[at], bound[at] = self._linear("expert_hidden", x[at], tensors.layer_tensor(spec, layer, "w_down", int(expert)))
                if spec.clamped_experts is not None:
                    value[at], bound[at] = self._biased(value[at], bound[at], layer, "b_down", int(expert))
        return value, bound

    def _entering(self, layer: int, x: F64, at: tuple[NDArray[np.int64], ...]) -> F64:
        """What enters an expert, (n, hidden): its tokens, times their weights if the rule says so; exactly, in float32."""
        if not self._spec.routing.probability_before_ffn:
            return x[at[0]]
        product: NDArray[np.float32] = x[at[0]].astype(np.float32) * self._record.stages[layer, "topk_weights"][at][:, None]
        return rounded(product, self._precision.dtype).astype(np.float64)

    def _attend(self, layer: int) -> dict[str, Bounded]:
        """Maximum, denominator and context, each from the stages before it; a stage whose inputs lack a part is not to be asked for."""
        spec, stages, seq, pos = self._spec, self._record.stages, self._record.seq, self._record.pos
        own_max, own_den = (self._own(layer, n) for n in ("attn_max", "attn_denominator"))
        v: F64 | None
        if spec.latent is None:
            of_q, of_k, of_v = attended(spec, layer)
            q, k = (stages[layer, n].astype(np.float64) for n in (of_q, of_k))
            v = self._own(layer, of_v)
        else:
            q, k, v = local_latent.attended(self._record, layer)
        k = rounded(k, self._precision.kv).astype(np.float64)
        v = v if v is None else rounded(v, self._precision.kv).astype(np.float64)
        group, scale = spec.num_heads // spec.cached_heads, spec.attention_scale
        sinks, softmax = self._vector(layer, "sinks") if spec.attn_sinks else None, self._precision.softmax
        shapes = {"attn_max": q.shape[:2], "attn_denominator": q.shape[:2], "attn_context": (*q.shape[:2], 0 if v is None else v.shape[2])}
        out: dict[str, Bounded] = {name: (np.full(shape, np.nan), np.full(shape, np.nan)) for name, shape in shapes.items()}
        for s in np.unique(seq):
            t = np.flatnonzero(seq == s)
            mask = formulas.visible(seq[t], pos[t], spec.pattern(layer))
            if spec.indexer is not None:
                mask &= stages[chosen_in(spec, layer), "index_keys"][t][:, pos[t]]
            for head, seen in enumerate(np.broadcast_to(mask, (spec.num_heads, len(t), len(t)))):
                n = seen.sum(axis=1)
                qh, kh = q[t, head], k[t, head // group]
                scores, e_scores = scale * (qh @ kh.T), tolerance.score_bound(qh, kh, scale)
                if spec.scales.scores_cap is not None:
                    cap = float(np.float32(spec.scales.scores_cap))
                    scores, e_scores = cap * np.tanh(scores / cap), tolerance.capped_bound(scores, e_scores, cap)
                scores, e_scores = np.where(seen, scores, -np.inf), np.where(seen, e_scores, 0.0)
                if sinks is not None:  # one more score, exactly known
                    scores = np.concatenate([np.full((len(t), 1), sinks[head]), scores], axis=1)
                    e_scores = np.concatenate([np.zeros((len(t), 1)), e_scores], axis=1)
                if softmax is None:
                    out["attn_max"][0][t, head] = scores.max(axis=1)
                    out["attn_max"][1][t, head] = tolerance.maximum_bound(scores, e_scores)
                else:
                    out["attn_max"][0][t, head], out["attn_max"][1][t, head] = rounded_softmax.maximum(scores, e_scores, softmax)
                if own_max is None:
                    continue
                m = own_max[t, head]
                if softmax is not None:
                    vh = np.zeros((len(t), 0)) if v is None else v[t, head // group]
                    state = rounded_softmax.follow(scores, e_scores, m, vh, softmax, has_sink=sinks is not None)
                    out["attn_denominator"][0][t, head], out["attn_denominator"][1][t, head] = state.denominator
                    if own_den is not None and v is not None:
                        out["attn_context"][0][t, head], out["attn_context"][1][t, head] = state.context(own_den[t, head])
                    continue
                p = np.exp(scores - m[:, None])
                e_p = tolerance.softmax_term_error(scores, m, e_scores)
                out["attn_denominator"][0][t, head] = p.sum(axis=1)
                out["attn_denominator"][1][t, head] = tolerance.denominator_bound(p, e_p, n + (sinks is not None))
                if own_den is None or v is None:
                    continue
                vh, den = v[t, head // group], own_den[t, head]
                if sinks is not None:
                    p, e_p = p[:, 1:], e_p[:, 1:]
                out["attn_context"][0][t, head] = p @ vh / den[:, None]
                out["attn_context"][1][t, head] = tolerance.context_bound(p, e_p, vh, den, n)
        value, bound = out.pop("attn_context")
        if spec.latent is not None:
            return out | {"attn_latent": (value, bound)}
        return out | {"attn_context": (value.reshape(len(q), -1), bound.reshape(len(q), -1))}

    def _glu(self, layer: int, x: F64, expert: tensors.Expert) -> Bounded:
        gate, e_gate = self._linear("ffn_norm", x, tensors.layer_tensor(self._spec, layer, "w_gate", expert))
        up, e_up = self._linear("ffn_norm", x, tensors.layer_tensor(self._spec, layer, "w_up", expert))
        clamped = self._spec.clamped_experts if isinstance(expert, int) else None
        if clamped is not None:
            alpha, limit = float(np.float32(clamped.alpha)), float(np.float32(clamped.limit))
            gate, e_gate = self._biased(gate, e_gate, layer, "b_gate", expert)
            up, e_up = self._biased(up, e_up, layer, "b_up", expert)
            value = formulas.clamped_glu(gate, up, alpha, limit).astype(np.float64)
            return value, tolerance.clamped_glu_bound(gate, up, e_gate, e_up, alpha, limit)
        activation = self._spec.activation
        return formulas.glu(gate, up, activation).astype(np.float64), tolerance.glu_bound(gate, up, e_gate, e_up, activation)

    def _biased(self, value: F64, bound: F64, layer: int, role: str, expert: tensors.Expert) -> Bounded:
        """``value + bias``, `value` being known to `bound`."""
        total = value + self._weights.layer(layer, role, expert)
        return total, bound + tolerance.add_bound(np.abs(total) + bound)

    def _linear(self, stage: str, x: F64, published: tensors.Published) -> Bounded:
        """A product of what `stage` gave."""
        return self._products.linear(stage, x, self._weights.raw(published))

    def _scores(self, x: F64, published: tensors.Published) -> Bounded:
        """A product whose sums are float32."""
        return self._products.scores(x, self._weights.raw(published))

    def _input(self, layer: int | None, name: str) -> str:
        """The stage that a stage is a product with."""
        return inputs_of(self._spec, (layer, name))[0][1]

    def _inputs(self, layer: int | None, name: str) -> list[F64]:
        return [self._record.stages[stage].astype(np.float64) for stage in inputs_of(self._spec, (layer, name))]

    def correction(self, layer: int) -> F64 | None:
        """Correction bias of a layer's router, where it has one."""
        return self._vector(layer, "e_score_correction_bias") if self._spec.routing.e_score_correction_bias else None

    def _vector(self, layer: int, role: str) -> F64:
        return self._read(tensors.layer_tensor(self._spec, layer, role).name).astype(np.float64)

    def _own(self, layer: int, name: str) -> F64 | None:
        value = self._record.stages.get((layer, name))
        return None if value is None else value.astype(np.float64)
