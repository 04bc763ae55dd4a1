"""Which weights are pruned: names and offsets, patterns, the choice of the next ones, and the sparsity they make."""
