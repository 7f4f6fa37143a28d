"""Brings a data set from its source to a checked dataset version, and opens it."""
