"""This machine: files, locks, threads, signals, output, network, and processes that die with their owner."""
