"""Checks once whether a healthy server answers at an address: `python -m infra.health_check URL`."""

import sys

import httpx

TIMEOUT_SECONDS = 5.0


def answers(url: str) -> bool:
    """Returns whether the answer has a success status."""
    try:
        return httpx.get(url, timeout=TIMEOUT_SECONDS, trust_env=False).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(not answers(sys.argv[1]))
