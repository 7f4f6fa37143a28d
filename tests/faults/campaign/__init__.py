"""Runs trainings that a random fault hits at a random moment, does what a user would do, and checks what must hold.

    make faults MINUTES=30 SEED=1
    .venv/bin/python -m tests.faults.campaign --trial 123456     replays a trial by its seed

`tables.py` lists the moments, the faults and the invariants. A campaign has a stack of its own in a temporary folder,
and trains on digits with two ranks, for some seconds per trial. As root, the state folder, its runs, its cache and the
temporary folder are small disks, which can be filled.
"""
