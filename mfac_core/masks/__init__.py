"""Which weights are pruned: names and offsets, patterns, and the choice of the next ones."""
