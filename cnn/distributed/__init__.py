"""Data-parallel training by lanes: the result does not depend on the number of ranks."""
