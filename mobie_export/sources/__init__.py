"""Where a model comes from: a GGUF, a Hugging Face folder, or a model of the hub by its name."""
