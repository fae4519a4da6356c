"""Kinds of caches, one module each; importing this package registers them."""

from kvslim.caches.base import CACHES, Cache, Place
from kvslim.caches.clustered import ClusteredCache
from kvslim.caches.coded import CodedCache, IntegerCache
from kvslim.caches.full import FullCache
from kvslim.caches.linear import LinearCache
from kvslim.caches.packed import PackedCache
from kvslim.caches.shared import SharedCache
from kvslim.caches.window import WindowCache

__all__ = [
    "CACHES",
    "Cache",
    "ClusteredCache",
    "CodedCache",
    "FullCache",
    "IntegerCache",
    "LinearCache",
    "PackedCache",
    "Place",
    "SharedCache",
    "WindowCache",
]
