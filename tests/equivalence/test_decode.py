"""A continuation is held against the verified logits: what decoding with the cache gets wrong is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.layers.kv_cache import KVCache

CONFIG = {
    "model_type": "mixtral", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 3, "num_experts_per_tok": 2,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
IDS = np.array([[5, 9, 2, 7, 1], [0, 0, 3, 8, 4]])
MASK = np.array([[1] * 5, [0, 0, 1, 1, 1]])


def make(**changes: object) -> wse.WaferModel:
    return wse.from_config(CONFIG | changes, seed=2, wafer=wse.Wafer(wse.WSE3, rows=3, cols=3))


def whole_mask(n_new: int) -> np.ndarray:
    return np.concatenate([MASK, np.ones((2, n_new), np.int64)], axis=1)


@pytest.mark.parametrize("sampler", [None, wse.Sampler(temperature=1.5, top_k=9, seed=4)], ids=["greedy", "sampled"])
def test_a_sound_continuation_passes(sampler: wse.Sampler | None) -> None:
    model = make()
    out = model.generate(IDS, 9, attention_mask=MASK, sampler=sampler)
    report = model.verify(out, whole_mask(9), n_prompt=5, sampler=sampler)
    assert report.passed, str(report)
    assert (report.stages[-1].stage, report.stages[-1].kind) == ("generated", "decode")
    other = wse.Sampler(temperature=1.5, top_k=9, seed=5)
    assert not model.verify(out, whole_mask(9), n_prompt=5, sampler=other).passed


def test_a_cache_that_is_not_written_in_decode_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    sound = model.generate(IDS, 9, attention_mask=MASK)
    real = KVCache.append

    def lazy(cache: KVCache, layer: int, qkv: object, sequences: object, bands: object, **more: object) -> None:
        if sequences.n_tokens > 2:  # type: ignore[attr-defined]
            real(cache, layer, qkv, sequences, bands, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "append", lazy)
        broken = model.generate(IDS, 9, attention_mask=MASK)
    row, column = (int(i[0]) for i in np.nonzero(broken != sound))
    report = model.verify(broken, whole_mask(9), n_prompt=5)
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.check.token == (row, column - int((MASK[row] == 0).sum()))
    assert f"decoding chose {broken[row, column]}, the logits of the whole sequence choose {sound[row, column]}" in str(report)


def test_filling_after_the_end_token_is_not_judged() -> None:
    model = make()
    free = model.generate(IDS, 6, attention_mask=MASK)
    eos = int(free[0, 6])
    ended = make(eos_token_id=eos, pad_token_id=0)
    out = ended.generate(IDS, 6, attention_mask=MASK)
    assert (out[0, 7:] == 0).all()
    assert ended.verify(out, whole_mask(out.shape[1] - 5), n_prompt=5).passed


def test_rotations_that_follow_the_length_are_not_judged_and_this_is_said() -> None:
    model = make(rope_scaling={"type": "dynamic", "factor": 2.0})
    report = model.verify(model.generate(IDS, 3, attention_mask=MASK), whole_mask(3), n_prompt=5)
    assert report.passed
    assert "generated tokens: rotary scaling dynamic follows the length" in str(report)


@pytest.mark.parametrize("n_prompt", [0, 6, True, 2.0])
def test_a_prompt_must_lie_within_the_sequence(n_prompt: object) -> None:
    with pytest.raises(wse.InputError, match=r"`n_prompt` must be an integer in 1\.\.5"):
        make().verify(IDS, MASK, n_prompt=n_prompt)


def test_attention_spread_evenly_over_many_keys_is_within_the_denominators_bound() -> None:
    """Equal terms round to one side: a rule for random terms would refuse this run."""
    config = CONFIG | {"initializer_range": 1e-4, "max_position_embeddings": 4096, "num_hidden_layers": 1}
    roomy = dataclasses.replace(wse.WSE3, sram_bytes_per_core=1 << 22)
    model = wse.from_config(config, seed=0, wafer=wse.Wafer(roomy, rows=2, cols=2))
    report = model.verify(np.random.default_rng(0).integers(0, 40, 1500))
    assert report.passed, str(report)
