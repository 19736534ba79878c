"""The weights of a model as the reference reads them: published names, published order, checked shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.errors import CheckpointError
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.precision import FLOAT32, Precision
from wse_emu.reference import formulas, tensors
from wse_emu.reference.formulas import Floats
from wse_emu.reference.storage import rounded

Reader = Callable[[str], NDArray[Any]]
"""Published tensor name to its values, a real floating array in the published ``[out, in]`` order."""


class PublishedWeights:
    """Weights of one model in one dtype, read where they are needed and not kept.

    Parameters
    ----------
    spec : ModelSpec
    read : callable
        ``read(name)`` returns one published tensor.
    dtype : dtype
        Of the computation.
    precision : Precision
        Formats to which `stored` and `kept` round what stages give, and in which `product` hands sums on.
    n_columns : int
        Parts of which `product` adds one after another.
    """

    def __init__(
        self, spec: ModelSpec, read: Reader, dtype: np.dtype[Any], precision: Precision = FLOAT32, n_columns: int = 1
    ) -> None:  # fmt: skip
        self.spec, self.dtype, self.precision, self.n_columns = spec, dtype, precision, n_columns
        self._read = read

    def stored(self, x: Floats) -> Floats:
        """What a stage gives, as it is stored."""
        return rounded(x, self.precision.dtype)

    def kept(self, x: Floats) -> Floats:
        """Keys or values as the cache keeps them."""
        return rounded(x, self.precision.kv)

    @property
    def in_softmax(self) -> Callable[[Floats], Floats] | None:
        """How the state of softmax is rounded, if it is."""
        dtype = self.precision.softmax
        return None if dtype is None else lambda x: rounded(x, dtype)

    def product(self, x: Floats, weight: Floats) -> Floats:
        """``x @ weight.T``: x (T, in), weight (out, in) -> (T, out); in parts where these are handed on in 16 bits."""
        if self.precision.sums is None:
            return formulas.linear(x, weight)
        parts = np.array_split(np.arange(x.shape[1]), min(self.n_columns, x.shape[1]))
        total = formulas.linear(x[:, parts[0]], weight[:, parts[0]])
        for part in parts[1:]:
            total = rounded(total, self.precision.dtype) + formulas.linear(x[:, part], weight[:, part])
        return total

    def product_per_head(self, x: Floats, weight: Floats) -> Floats:
        """``x[:, head] @ weight[head].T``: x (T, heads, in), weight (heads, out, in) -> (T, heads, out)."""
        if self.precision.sums is None:
            return formulas.per_head(x, weight)
        return np.stack([self.product(x[:, head], weight[head]) for head in range(x.shape[1])], axis=1)

    def layer(self, layer: int, role: str, expert: tensors.Expert = None) -> Floats:
        """Tensor of one layer by its role; see `tensors.layer_tensor`."""
        return self.tensor(tensors.layer_tensor(self.spec, layer, role, expert))

    def norm(self, layer: int | None, role: str) -> Floats:
        """Weight of a norm as it is applied: ``1 + w`` where the family means that, ones where heads' norms have none."""
        of_heads = self.spec.qk_norm
        if role in ("q_norm", "k_norm") and of_heads is not None and not of_heads.weighted:
            return np.ones(self.spec.head_dim, self.dtype)
        weight = self.tensor(tensors.final_norm(self.spec) if layer is None else tensors.layer_tensor(self.spec, layer, role))
        return weight + weight.dtype.type(1) if self.spec.norm.unit_offset else weight

    def normed(self, layer: int | None, role: str, x: Floats) -> Floats:
        """A norm of the residual stream, of `x` (T, hidden)."""
        weight, eps = self.norm(layer, role), self.spec.rms_norm_eps
        if self.spec.norm.kind == "rms":
            return self.stored(formulas.rms_norm(x, weight, eps))
        return self.stored(formulas.layer_norm(x, weight, self.norm_bias(layer, role), eps))

    def norm_bias(self, layer: int | None, role: str) -> Floats | None:
        """Bias of a norm of the residual stream, where it has one."""
        if not self.spec.norm.bias:
            return None
        return self.tensor(tensors.final_norm_bias(self.spec)) if layer is None else self.layer(layer, role + "_bias")

    def tensor(self, published: tensors.Published) -> Floats:
        """A tensor in the dtype of the computation."""
        return formulas.cast(self.raw(published), self.dtype)

    def raw(self, published: tensors.Published) -> NDArray[Any]:
        """A tensor as it was read."""
        value = np.asarray(self._read(published.name))
        expected = published.shape if published.whole is None else published.whole
        if value.shape != expected:
            raise CheckpointError(f"tensor `{published.name}` must have shape {expected}, got {value.shape}")
        if not np.issubdtype(value.dtype, np.floating):
            raise CheckpointError(f"tensor `{published.name}` must be read as real floating values, got {value.dtype}")
        return value if published.pick is None else published.pick(value)
