"""The networks by name, the modules that wrap them, and files of weights."""
