"""Attention patterns as JSON: there and back, and what is refused, by key and rule."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wse_emu as wse
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.pattern_json import pattern_from_json, pattern_text, pattern_to_json, patterns_from_json

SIZES = st.integers(1, 50)
LOCAL = st.one_of(st.builds(lambda n: {"window": n}, SIZES), st.builds(lambda n: {"chunk": n}, SIZES))
COLUMNS = st.one_of(
    st.just({}), st.builds(lambda w, more: {"column_spacing": w + more, "column_width": w}, SIZES, st.integers(0, 9)),
    st.builds(lambda w, at: {"column_spacing": w, "column_width": w, "column_start": at}, SIZES, st.integers(0, 9)),
)  # fmt: skip
PLAIN = st.builds(lambda local, sinks, columns: AttentionPattern(**local, **columns, sinks=sinks), LOCAL, st.integers(0, 9), COLUMNS)
OTHERS = st.sampled_from([
    AttentionPattern(), AttentionPattern(block_size=3, blocks=((0,), (0, 1), (1, 2))), AttentionPattern(mask=np.tri(4, dtype=np.bool_)),
    AttentionPattern.listed([[0, -1, -1], [1, 0, -1], [0, 9, 2], [3, -1, 1]], [1, 2, 3, 1]),
    AttentionPattern.fixed(local_attn_ctx=8, vert_size=2, subset=1),
    AttentionPattern.fixed_per_head(num_heads=4, num_verts=2, local_attn_ctx=8, vert_size=2),
])  # fmt: skip


@settings(max_examples=60)
@given(st.one_of(PLAIN, OTHERS, st.lists(PLAIN, min_size=1, max_size=3).map(lambda heads: AttentionPattern(heads=tuple(heads)))))
def test_a_pattern_survives_json(pattern: AttentionPattern) -> None:
    written = json.loads(json.dumps(pattern_to_json(pattern)))
    assert pattern_from_json(written) == pattern
    assert patterns_from_json([written, None]) == [pattern, None]


def test_what_is_default_is_left_out_and_null_is_default() -> None:
    assert pattern_to_json(AttentionPattern()) == {}
    assert pattern_to_json(AttentionPattern(window=5, sinks=1)) == {"window": 5, "sinks": 1}
    assert pattern_from_json({"window": 5, "chunk": None, "sinks": None}) == AttentionPattern(window=5)
    assert pattern_from_json({"mask": [[True, False], [1, 1]]}) == AttentionPattern(mask=np.tri(2, dtype=np.bool_))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "here: must be an object with fields of a pattern .*, got 7"),
        ({"windw": 5}, "here: there is no field 'windw'; there are window, chunk, sinks"),
        ({"window": 0}, "here: `window` must be an integer >= 1 or None, got 0"),
        ({"window": True}, "here: `window` must be an integer >= 1"),
        ({"window": float("nan")}, "here: `window` must be an integer >= 1"),
        ({"window": 5, "chunk": 5}, "here: `window` and `chunk` are two local parts"),
        ({"sinks": 2}, "here: `sinks` adds keys to a local part"),
        ({"window": 5, "column_spacing": 3}, "here: `column_spacing` and `column_width` belong together"),
        ({"blocks": 5, "block_size": 2}, "here: `blocks` must be a list of lists, got 5"),
        ({"blocks": [[1]], "block_size": 2}, r"here: `blocks\[0\]` must name blocks"),
        ({"blocks": [[0, "a"]], "block_size": 2}, r"here: `blocks\[0\]` must name blocks"),
        ({"mask": [1]}, "here: `mask` must be a list of lists"),
        ({"mask": [[1, 0]]}, "here: `mask` must have as many keys as queries, 1; row 0 has 2"),
        ({"mask": [[1, 0], [1, 2]]}, r"here: `mask` must hold true and false, or 1 and 0; \[1\]\[1\] is 2"),
        ({"mask": [[1.0]]}, r"here: `mask` must hold .* \[0\]\[0\] is 1.0"),
        ({"heads": {}}, "here: `heads` must be a list"),
        ({"heads": [{}, {"sinks": 1}]}, r"here: heads\[1\]: `sinks` adds keys"),
        ({"heads": [{"heads": [{}]}]}, r"here: heads\[0\]: must be a pattern without `heads`"),
        ({"indices": [0]}, "here: `indices` must be a list of lists, got"),
        ({"indices": []}, r"here: `indices` must be integers \(queries, topk\)"),
        ({"indices": [[0], [0, 1]]}, "here: `indices` must have rows of one length; fill shorter ones with -1"),
        ({"indices": [[0.0]]}, r"here: `indices` must hold integers in -1\.\.281474976710656, got \[\[0\.0\]\]"),
        ({"indices": [[-2]]}, r"here: `indices` must hold integers in -1\.\."),
        ({"indices": [[0]], "topk_length": 1}, "here: `topk_length` must be a list with a number for every query, got 1"),
        ({"indices": [[0]], "topk_length": [2]}, r"here: `topk_length` must lie in 0\.\.1, got 2 to 2"),
        ({"topk_length": [1]}, "here: `indices` stands alone or with `topk_length`, got `topk_length`"),
        ({"indices": [[0]], "window": 3}, "here: `indices` stands alone or with `topk_length`, got `indices`, `window`"),
        ({"window": 1 << 49}, "here: `window` must be at most 281474976710656, got 562949953421312"),
        ({"window": 1, "sinks": 1 << 300}, "here: `sinks` must be at most .*, got an integer of 301 bits"),
        ({"block_size": 1 << 64, "blocks": [[0]]}, "here: `block_size` must be at most"),
        ([{}, {"window": -1}], "here: layer 1: `window` must be"),
    ],
)
def test_what_is_no_pattern_is_refused_by_key_and_rule(value: Any, message: str) -> None:
    with pytest.raises(wse.SpecError, match=f"^{message}"):
        patterns_from_json(value, where="here")


def test_a_function_has_no_form_in_json_and_a_line_for_people() -> None:
    pattern = AttentionPattern(mask=lambda q, k: k <= q)
    with pytest.raises(wse.SpecError, match="`mask` is a function, which has no form in JSON; give an array"):
        pattern_to_json(pattern)
    assert pattern_text(pattern) == "mask <lambda>"
    assert pattern_text(AttentionPattern(mask=np.tri(3, dtype=np.bool_))) == "mask <mask of 3 positions>"
    assert pattern_text(AttentionPattern.listed([[0], [1]])) == "mask <2 keys listed for 2 queries>"
    assert pattern_text(AttentionPattern(block_size=2, blocks=((0,),))) == "block size 2, blocks 1"
    assert pattern_text(AttentionPattern.fixed_per_head(num_heads=4, num_verts=2)) == "heads in 2 ways"


def test_positions_that_a_pattern_describes() -> None:
    assert AttentionPattern.listed([[0], [1]]).n_positions == 2
    mask, blocks = AttentionPattern(mask=np.tri(7, dtype=np.bool_)), AttentionPattern(block_size=3, blocks=((0,), (1,)))
    assert (mask.n_positions, blocks.n_positions, AttentionPattern(window=3).n_positions) == (7, 6, None)
    assert AttentionPattern(heads=(mask, AttentionPattern(), blocks)).n_positions == 6
    assert AttentionPattern(heads=(AttentionPattern(),)).n_positions is None
