"""Predicts images with a registered version, and exports the version to a file."""
