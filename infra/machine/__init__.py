"""This machine: files, locks, threads, signals, output, network, and processes that end with their owner."""
