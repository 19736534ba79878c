"""The model, densely and without a machine: what every result of the emulator is held against.

Nothing here is shared with the emulator except `ModelSpec` and the published tensors, which are handed in by a callable.
"""

from wse_emu.reference.dense import DenseReference, Routing
from wse_emu.reference.weights import Reader

__all__ = ["DenseReference", "Reader", "Routing"]
