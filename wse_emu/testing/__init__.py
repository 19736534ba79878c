"""Reusable tests and inputs for those who write parts of their own: a conformance class per interface (needs pytest)."""

from wse_emu.testing.checkpoints import write_checkpoint
from wse_emu.testing.weight_store import WeightStoreContract, contract_specs

__all__ = ["WeightStoreContract", "contract_specs", "write_checkpoint"]
