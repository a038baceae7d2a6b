"""Pruning in other libraries: `transformers` and `vllm`."""
