"""Evaluates trained weights: numbers, pictures and a report page."""
