"""Model families as Hugging Face publishes them: what sets one apart, declared; how to read config.json and name tensors follows from it.

Defaults of absent fields are those of the families' configuration classes in transformers 5, but the sizes that define a model have none.
"""

from wse_emu.checkpoint.families.table import ARCHITECTURES, FAMILIES, family_of

__all__ = ["ARCHITECTURES", "FAMILIES", "family_of"]
