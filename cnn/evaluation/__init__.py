"""Scores of a network on a split, and how well its probabilities are calibrated."""
