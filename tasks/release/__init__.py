"""Registers a trained version, lets gates and people judge it, promotes it to champion, and describes it."""
