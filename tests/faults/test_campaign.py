"""A trial of the campaign is a function of its seed. The campaign itself is `make faults`."""

from itertools import islice

from tests.faults.campaign.__main__ import seeds
from tests.faults.campaign.tables import FAULTS, MOMENTS, plan


def test_a_seed_gives_the_same_trials() -> None:
    first, second, other = (list(map(plan, islice(seeds(seed), 20))) for seed in (7, 7, 8))
    assert first == second != other


def test_every_fault_comes_at_every_moment_at_which_it_can() -> None:
    planned = {(each.family, each.fault, each.moment) for each in map(plan, range(10_000))}
    assert planned == {
        (family, name, moment)
        for family, faults in FAULTS.items()
        for name, (_, moments) in faults.items()
        for moment in moments
    }
    assert {moment for _, _, moment in planned} == set(MOMENTS)
