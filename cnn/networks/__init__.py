"""The networks, the modules that wrap them, and files of weights."""
