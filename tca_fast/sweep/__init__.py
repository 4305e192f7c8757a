"""One run for each L1 weight, and the trade-off between faithfulness and sparsity they make."""
