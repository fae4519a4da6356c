"""Running an exported folder on stock onnxruntime, without torch and without transformers."""
