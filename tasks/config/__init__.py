"""Everything that a user may set, read and checked without loading torch."""
