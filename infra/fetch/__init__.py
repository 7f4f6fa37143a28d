"""Fetches files from web servers and Debian packages."""
