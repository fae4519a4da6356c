"""KVSlim: smaller KV caches for ONNX language models, measured."""

__version__ = "0.1.0"
