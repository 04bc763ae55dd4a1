"""What to prune, when and how, and what else a recipe changes in training, as validated dataclasses."""
