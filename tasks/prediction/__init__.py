"""Uses a registered version: predicts images, and exports it to a file."""
