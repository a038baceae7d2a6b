"""The Triton kernels: five files for the nine operators, and a few that they share.

`operators` has the operators by name.
"""
