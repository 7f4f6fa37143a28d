"""Uses a registered version as outsiders do: in a fresh process, and over HTTP."""
