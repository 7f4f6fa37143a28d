"""Uses a registered version as outside users do: in a fresh process, and over HTTP."""
