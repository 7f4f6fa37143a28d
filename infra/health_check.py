"""Asks an address once whether a healthy server answers there: `python -m infra.health_check URL`."""

import sys

import httpx

PATIENCE = 5.0  # seconds


def answers(url: str) -> bool:
    """Whether the answer says success."""
    try:
        return httpx.get(url, timeout=PATIENCE, trust_env=False).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    sys.exit(not answers(sys.argv[1]))
