"""Random weights: the same in any order and any piece, different by seed and name."""

from __future__ import annotations

import numpy as np
import pytest

from wse_emu.checkpoint import published_names, random_checkpoint, to_config
from wse_emu.foundation.errors import ConfigError
from wse_emu.testing import contract_specs

SPEC = contract_specs()["mixtral"]


def test_same_seed_same_bits_in_any_order() -> None:
    a, b = random_checkpoint(SPEC, seed=5), random_checkpoint(to_config(SPEC), seed=5)
    names = a.tensors.names()
    values = {n: a.tensors.read(n) for n in names}
    for name in reversed(names):
        np.testing.assert_array_equal(b.tensors.read(name), values[name])
    assert a.tensors.fingerprint == b.tensors.fingerprint
    assert a.fingerprint == b.fingerprint


def test_rows_are_those_of_the_whole_across_blocks() -> None:
    config = {**to_config(SPEC), "hidden_size": 1000, "vocab_size": 150}  # 32 rows a block
    tensors = random_checkpoint(config, seed=1).tensors
    whole = tensors.read("lm_head.weight")
    for start, stop in ((0, 150), (0, 1), (31, 33), (32, 64), (5, 149), (150, 150)):
        np.testing.assert_array_equal(tensors.read_rows("lm_head.weight", start, stop), whole[start:stop])
    assert not np.array_equal(whole[:32], whole[32:64])


def test_seed_and_name_change_the_values() -> None:
    a, b = random_checkpoint(SPEC, seed=0), random_checkpoint(SPEC, seed=1)
    gate, up = (a.tensors.read(f"model.layers.0.block_sparse_moe.experts.0.{w}.weight") for w in ("w1", "w3"))
    assert not np.array_equal(gate, up)
    assert not np.array_equal(gate, b.tensors.read("model.layers.0.block_sparse_moe.experts.0.w1.weight"))
    assert a.fingerprint != b.fingerprint
    assert a.tensors.fingerprint != b.tensors.fingerprint


def test_scales_are_those_asked_for() -> None:
    config = {**to_config(SPEC), "hidden_size": 2000}
    for scale, given in ((0.02, {}), (0.5, {"initializer_range": 0.5})):
        tensors = random_checkpoint({**config, **given}, seed=0).tensors
        head, norm = tensors.read("lm_head.weight"), tensors.read("model.norm.weight")
        assert head.std() == pytest.approx(scale, rel=0.02)
        assert abs(head.mean()) < 0.01 * scale
        assert norm.mean() == pytest.approx(1.0, abs=0.02)
        assert norm.std() == pytest.approx(0.1, rel=0.1)


def test_every_published_tensor_is_there_with_its_shape() -> None:
    for spec in contract_specs().values():
        checkpoint = random_checkpoint(spec, seed=0)
        assert checkpoint.spec == spec
        published = {t.name: t.shape for t in published_names(spec).values()}
        assert list(checkpoint.tensors.names()) == sorted(published)
        assert sum(int(np.prod(s)) for s in published.values()) == spec.n_params
        for name, shape in published.items():
            assert checkpoint.tensors.shape(name) == checkpoint.tensors.read(name).shape == shape


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", None])
def test_seed_must_be_a_non_negative_integer(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"`seed` must be an integer in 0\.\."):
        random_checkpoint(SPEC, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0, -0.1, 2, "x", True, float("nan")])
def test_initializer_range_is_checked(scale: object) -> None:
    with pytest.raises(ConfigError, match="`initializer_range` must lie in"):
        random_checkpoint({**to_config(SPEC), "initializer_range": scale}, seed=0)
