"""Where an element of a stage lies on the wafer."""

import numpy as np
import pytest

from wse_emu.equivalence.stages import core_of, expected_stages, inputs_of, stage_shape
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.taps import TapRecord

SPEC = ModelSpec(
    family="mixtral", vocab_size=50, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
    rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64, num_experts=6, top_k=2, moe_intermediate_size=40,
)  # fmt: skip


def record(units, **starts):
    """Five tokens on rows 0, 0, 1, 1, 2; `units` are the first pair units of the columns."""
    n = np.arange(5)
    return TapRecord(0 * n, n, n, row_of_token=n // 2, col_starts={"heads": np.array(units) * 6, **starts})


@pytest.mark.parametrize("units", [[0, 4], [0, 2, 4, 6], [0, 1, 1, 3, 4, 7, 8], [0, 0, 5]], ids=str)
def test_heads_are_found_through_their_pair_units(units):
    """Element i of a head belongs to pair unit ``g * d/2 + i % (d/2)`` of its key/value head g, and the unit to one column."""
    column_of_unit = [max(c for c in range(len(units)) if units[c] <= unit) for unit in range(8)]
    r = record(units)
    for head in range(6):
        for i in range(8):
            wanted = column_of_unit[head // 3 * 4 + i % 4]
            for name, element in (("q", (head, i)), ("q_rope", (head, i)), ("attn_context", (head * 8 + i,))):
                assert core_of(r, SPEC, name, 3, element) == (1, wanted)
    for head in range(2):
        for i in range(8):
            for name in ("k", "k_rope", "v"):
                assert core_of(r, SPEC, name, 4, (head, i)) == (2, column_of_unit[head * 4 + i % 4])
    assert core_of(r, SPEC, "attn_max", 0, (5,)) == (0, column_of_unit[4])


def test_plain_axes_are_found_and_empty_columns_skipped():
    r = record([0, 4], hidden=np.array([0, 8, 8, 8, 20, 32]), ffn=np.array([0, 20]), expert=np.array([0, 18]), vocab=np.array([0, 25]))
    assert core_of(r, SPEC, "attn_out", 2, (8,)) == (1, 3)
    assert core_of(r, SPEC, "expert_out", 2, (1, 31)) == (1, 4)
    assert core_of(r, SPEC, "layer_out", 2, (7,)) == (1, 0)
    assert core_of(r, SPEC, "expert_hidden", 2, (0, 19)) == (1, 1)
    assert core_of(r, SPEC, "ffn_hidden", 2, (19,)) == (1, 0)
    assert core_of(r, SPEC, "logits", 2, (25,)) == (1, 1)


def test_what_the_record_does_not_say_is_none():
    n = np.arange(5)
    assert core_of(TapRecord(n, n, n), SPEC, "q", 2, (0, 0)) == (None, None)
    assert core_of(record([0, 4]), SPEC, "router_logits", 2, (3,)) == (1, None)
    assert core_of(record([0, 4]), SPEC, "logits", 2, (3,)) == (1, None)


def test_every_stage_has_a_shape_and_comes_after_its_inputs():
    seen = set()
    for stage in expected_stages(SPEC):
        assert stage_shape(SPEC, stage[1], 5)[0] == 5
        assert set(inputs_of(SPEC, stage)) <= seen
        seen.add(stage)
