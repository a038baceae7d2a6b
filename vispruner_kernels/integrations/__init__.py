"""Pruning in other libraries: `vispruner_kernels.integrations.transformers`."""
