"""Benchmarks: each measures Convoy against something else, in turns and in one run, and prints ratios.

    make bench        or    python -m tests.bench [NAME...] [--rounds N] [--json FILE] [--list]

Times on a shared machine drift by tens of per cent; ratios of neighbouring turns do much less. A new comparison is a
function that takes the number of rounds and returns `Comparison`s, and an entry of `COMPARISONS` in `__main__`.
"""
