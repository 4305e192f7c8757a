"""Triton kernels of the operators, one file per piece of work; `operators` puts them together.

Importing this package alone does not import Triton.
"""

# Share of active pairs above which dense products are assumed to beat gathered rows, on every
# shape, where nothing was measured: four rows of 2·D bytes for each pair at 60 % of 5.5 TB/s,
# against five products of 2·T·D·F operations at 750 TFLOP/s (performance floors §3).
ASSUMED_DENSE_SHARE = 1 / 180
