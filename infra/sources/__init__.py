"""Data sets that a user can name: `find` finds one, and one module per kind stores its files in the bucket."""
