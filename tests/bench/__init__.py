"""Benchmarks: each runs what it compares side by side, in one process and in turns, and prints ratios.

    make bench        or    python -m tests.bench [--rounds N] [--json FILE]

Times on a shared machine drift by tens of per cent; ratios of neighbouring rounds do not.
"""
