"""Where the ranks of a training run: one module per launcher."""
