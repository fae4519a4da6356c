"""Run by the Python that has optimum-onnx: FOLDER, token ids, count of new tokens, width of the cache (0: its own)."""

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompt, count, width = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(folder, local_files_only=True)
if int(width):
    model.embed_size_per_head = int(width)
ids = torch.tensor([[int(token) for token in prompt.split(",")]])
mask = torch.ones_like(ids)
output = model.generate(ids, attention_mask=mask, max_new_tokens=int(count), do_sample=False)
print(json.dumps({"version": version("optimum-onnx"), "tokens": output[0, ids.shape[1] :].tolist()}))
