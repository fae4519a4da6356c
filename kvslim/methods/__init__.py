"""The compression methods: one file each, found through the registry. Imports no torch."""

from kvslim.methods.base import METHODS, Method, method_class
from kvslim.methods.cluster_heads import ClusterHeads
from kvslim.methods.kv_hdc import KvHdc
from kvslim.methods.kv_pca import KvPca
from kvslim.methods.kv_quant import KvQuant
from kvslim.methods.kv_window import KvWindow
from kvslim.methods.linear_attention import LinearAttention
from kvslim.methods.prune_heads import PruneHeads
from kvslim.methods.prune_layers import PruneLayers
from kvslim.methods.prune_mlp import PruneMlp
from kvslim.methods.share_kv import ShareKv

__all__ = [
    "METHODS",
    "ClusterHeads",
    "KvHdc",
    "KvPca",
    "KvQuant",
    "KvWindow",
    "LinearAttention",
    "Method",
    "PruneHeads",
    "PruneLayers",
    "PruneMlp",
    "ShareKv",
    "method_class",
]
