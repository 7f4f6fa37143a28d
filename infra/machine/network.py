"""This machine's place in the network: the address that others reach it at, and what belongs to it."""

import socket
from urllib.parse import urlsplit

import psutil

from infra.errors import UsageError


def address_towards(url: str) -> str:
    """The address of this machine that requests to `url` come from; nothing is sent.

    Raises:
        UsageError: there is no way to that address.
    """
    parts = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 443))  # a datagram socket only chooses its route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(f"no way to {parts.hostname}: {error}; set CONVOY_ADDRESS, this machine's address") from None


def interface_of(address: str) -> str:
    """The name of the network interface that has this address.

    Raises:
        UsageError: none of this machine has it.
    """
    found = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    if address not in found:
        addresses = ", ".join(own for own in found if own.count(".") == 3)
        raise UsageError(f"{address} is no address of this machine (CONVOY_ADDRESS, --address); it has {addresses}")
    return found[address]


def free_port(address: str) -> int:
    """A port on which nobody listens at this address now."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])
