"""Triton kernels of the operators, one file per piece of work; `operators` puts them together."""
