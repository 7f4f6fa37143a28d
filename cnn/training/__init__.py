"""The training step, the loop around it, and their parts."""
