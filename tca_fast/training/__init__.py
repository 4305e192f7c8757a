"""Training: data, batches, engines, the loop, its state on disk and its logs."""
