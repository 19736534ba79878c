"""Small random models and records of runs; a run is the reference's own float32 twin, with faults put in afterwards."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from wse_emu.equivalence import VerifyReport, verify_record
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import TapRecord
from wse_emu.reference import DenseReference, tensors

MOE = ModelSpec(
    family="mixtral",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    num_experts=6,
    top_k=2,
    moe_intermediate_size=40,
)


@dataclass
class Case:
    """A model, its weights, and a record of three sequences; `record` is the test's own to break."""

    spec: ModelSpec
    weights: dict[str, np.ndarray]
    record: TapRecord

    def verify(self, **options) -> VerifyReport:
        return verify_record(self.record, self.spec, self.weights.__getitem__, **options)


def random_weights(spec, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    layers = ["attn_norm", "w_q", "w_k", "w_v", "w_o", "ffn_norm", *(["router"] if spec.is_moe else [])]
    wanted = [tensors.embed_tokens(spec), tensors.lm_head(spec), tensors.final_norm(spec)]
    for n in range(spec.num_layers):
        wanted += [tensors.layer_tensor(spec, n, role) for role in layers]
        experts = range(spec.num_experts) if spec.is_moe else [None]
        wanted += [tensors.layer_tensor(spec, n, role, e) for e in experts for role in ("w_gate", "w_up", "w_down")]
    out = {}
    for t in wanted:
        values = rng.standard_normal(t.shape)
        out[t.name] = (1 + 0.1 * values if values.ndim == 1 else values * scale / math.sqrt(t.shape[1])).astype(np.float32)
    return out


def run(spec, weights, lengths, seed=0):
    """Record of a run: the twin's stages, its tokens on rows of four, its features on four columns."""
    seq = np.repeat(np.arange(len(lengths)), lengths)
    pos = np.concatenate([np.arange(n) for n in lengths])
    ids = np.random.default_rng(seed).integers(0, spec.vocab_size, len(seq))
    stages = DenseReference(spec, weights.__getitem__, dtype=np.float32).forward(ids, seq, pos)
    starts = {"hidden": 8, "ffn": 10, "expert": 10, "heads": 8, "vocab": 13}
    return TapRecord(
        seq, pos, ids, stages, row_of_token=np.arange(len(seq)) // 4, col_starts={axis: np.arange(4) * w for axis, w in starts.items()}
    )


@pytest.fixture(scope="session")
def make():
    """Build a case: ``make(spec_changes..., lengths=..., seed=..., scale=..., weights=...)``."""

    def build(lengths=(7, 1, 12), seed=0, scale=1.0, weights=None, **changes):
        if changes.get("family") == "llama":
            changes |= {"num_experts": 0, "top_k": 0, "moe_intermediate_size": 0}
        spec = replace(MOE, **changes)
        weights = random_weights(spec, seed, scale) if weights is None else weights
        return Case(spec, weights, run(spec, weights, lengths, seed))

    return build


@pytest.fixture(scope="session")
def pristine(make):
    return make()


@pytest.fixture
def case(pristine):
    """A case whose record may be changed: its arrays are copies."""
    r = pristine.record
    copied = replace(r, stages={stage: value.copy() for stage, value in r.stages.items()}, col_starts=dict(r.col_starts))
    return Case(pristine.spec, dict(pristine.weights), copied)
