"""Markdown and grids of images, for all reports."""
