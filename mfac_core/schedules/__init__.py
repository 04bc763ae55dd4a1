"""Pure functions of the step: sparsity, rows, learning rate, and what is due."""
