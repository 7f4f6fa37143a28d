"""Turns a data set from its source into a checked dataset version, and opens it."""
