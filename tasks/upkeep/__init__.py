"""Finds leftovers, removes old data, and describes the machine for bug reports."""
