"""The step loop, the order of batches, what to skip, checkpoints."""
