"""A campaign: a random fault at a random moment of a training, then what a user would do, then what must hold.

make faults MINUTES=30 SEED=1
.venv/bin/python -m tests.faults.campaign --trial 123456        replays a trial by the seed that was printed

A stack of its own in a temporary folder; digits, two ranks, a second or two of training. As root, the state folder, its
runs, its cache and the temporary folder are small disks, which can be filled. The three tables are `faults.MOMENTS`,
`faults.FAULTS` and `invariants.INVARIANTS`.
"""
