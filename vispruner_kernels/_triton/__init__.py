"""The Triton kernels, one file an operator; `operators` has the operators by name."""
