"""One training: its order, its processes and its checkpoints."""
