"""How the trained weights do, as numbers, pictures and a page."""
