"""Launchers, which start the ranks of a training: one module per launcher."""
