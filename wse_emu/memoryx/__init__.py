"""Weights at rest and in flight: the wafer-layout store, its cache, and bounded prefetch."""

from wse_emu.memoryx.build import CacheEntry, cache_directory, cache_entries, clear_cache, open_store
from wse_emu.memoryx.disk import DiskBytes
from wse_emu.memoryx.layout import context_to_published, layout_bytes, qkv_to_published
from wse_emu.memoryx.mapped import RESIDENT_BYTES, MappedStore
from wse_emu.memoryx.prefetch import LayerStream
from wse_emu.memoryx.store import ArrayStore, ShapeStore, WeightStore

__all__ = [
    "RESIDENT_BYTES",
    "ArrayStore",
    "CacheEntry",
    "DiskBytes",
    "LayerStream",
    "MappedStore",
    "ShapeStore",
    "WeightStore",
    "cache_directory",
    "cache_entries",
    "clear_cache",
    "context_to_published",
    "layout_bytes",
    "open_store",
    "qkv_to_published",
]
