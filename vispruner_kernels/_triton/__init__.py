"""The Triton kernels, one file per operator and a few that they share.

`operators` has the operators by name.
"""
