"""Markdown and image grids for all reports."""
