"""The network as it is served, and its export to one file."""
