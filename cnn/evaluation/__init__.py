"""Scores of a network on a split, and the calibration of its probabilities."""
