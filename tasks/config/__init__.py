"""Reads and checks everything that a user may set, without loading torch."""
