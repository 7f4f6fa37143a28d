"""Unattended nights: every fault of a family in turn, and nobody types anything.

python -m tests.faults.campaign --family night --minutes 60        prints the same as a table, as it goes on
"""

import random
import subprocess
import sys

import pytest

from tests.faults.campaign.tables import FAULTS
from tests.faults.campaign.trial import UNATTENDED


@pytest.mark.faults
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("family", UNATTENDED)
def test_an_unattended_night(family: str) -> None:
    seed = str(random.SystemRandom().randrange(10**6))
    command = [sys.executable, "-m", "tests.faults.campaign", "--family", family, "--minutes", "80", "--seed", seed]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as campaign:
        try:
            out, errors = campaign.communicate()
        finally:
            campaign.terminate()  # so that it stops its servers, if this session is ended
    assert campaign.returncode == 0, out + errors[-2000:]
    assert f"{1 + len(FAULTS[family])} trials; failed: none" in out
