"""Hugging Face directories, untrusted by default: config.json to `ModelSpec`, tensor names per family, safetensors."""

from wse_emu.checkpoint.config import MAX_PARAMETERS, parse_config, read_config, to_config, unread_fields
from wse_emu.checkpoint.directory import open_checkpoint
from wse_emu.checkpoint.names import PublishedTensor, published_names, published_tensors
from wse_emu.checkpoint.random_weights import random_checkpoint
from wse_emu.checkpoint.source import Checkpoint, TensorSource
from wse_emu.checkpoint.write import MAX_SHARD_BYTES, StorageType, save_checkpoint

__all__ = [
    "MAX_PARAMETERS",
    "MAX_SHARD_BYTES",
    "Checkpoint",
    "PublishedTensor",
    "StorageType",
    "TensorSource",
    "open_checkpoint",
    "parse_config",
    "published_names",
    "published_tensors",
    "random_checkpoint",
    "read_config",
    "save_checkpoint",
    "to_config",
    "unread_fields",
]
