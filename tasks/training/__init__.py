"""Training: its order, its processes and its checkpoints."""
