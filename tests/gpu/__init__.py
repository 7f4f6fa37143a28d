"""Proves the training on this machine's GPUs: equal bits, deterministic kernels, and ranks that end together.

    python -m tests.gpu              on the GPUs; without one, it says so in a line
    python -m tests.gpu --cpu        the same checks on CPU cores

It takes this repository and what `cnn` imports, but no server, and prints a table. What takes more GPUs than there are
is listed as never run.
"""
