"""Continues a text: python generate.py ARTIFACT TEXT NEW_TOKENS, with onnxruntime, numpy and tokenizers alone."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, prompt, new_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ends = np.atleast_1d(json.loads((folder / "generation_config.json").read_text()).get("eos_token_id"))
session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
inputs = {node.name: node for node in session.get_inputs()}
step = np.array([tokenizer.encode(prompt).ids])
room = step.size + new_tokens
binding = session.io_binding()
for name, node in inputs.items():
    if name.startswith("past_key_values."):
        dtype = {"tensor(int8)": np.int8, "tensor(uint8)": np.uint8}.get(node.type, np.float32)
        shape = [size if isinstance(size, int) else room for size in (1, *node.shape[1:])]  # a window has fixed rows
        cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        binding.bind_ortvalue_input(name, cache)  # past and present are one buffer, so the kernel appends in place
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
binding.bind_output("logits", "cpu")

tokens, past = [], 0
while len(tokens) < new_tokens:
    total = past + step.size
    feeds = {"input_ids": step, "attention_mask": np.ones((1, total), np.int64)}
    feeds["position_ids"] = np.arange(past, total)[None]
    for name in feeds.keys() & inputs:
        binding.bind_cpu_input(name, feeds[name])
    session.run_with_iobinding(binding)
    token, past = int(binding.get_outputs()[-1].numpy()[0, -1].argmax()), total
    if token in ends:
        break
    tokens, step = [*tokens, token], np.array([[token]])
print(tokenizer.decode(tokens))
