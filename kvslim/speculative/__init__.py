"""Speculative decoding: drafts propose tokens, the model verifies them in one run, and the text stays the model's.

Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023.
"""
