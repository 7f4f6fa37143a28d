"""Decides whether a version may replace the champion, by paired comparison on the same test images."""
