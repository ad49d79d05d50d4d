"""A KV cache for TensorRT-LLM whose addresses never change."""
