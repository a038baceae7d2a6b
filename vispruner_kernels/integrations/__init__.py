"""Integrations: visual token pruning in transformers and in vLLM."""
