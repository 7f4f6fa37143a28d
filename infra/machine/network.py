"""This machine's addresses, network interfaces and free ports."""

import socket
from urllib.parse import urlsplit

import psutil

from infra.errors import UsageError


def address_towards(url: str) -> str:
    """Returns the address of this machine from which requests to `url` are sent. Sends nothing itself.

    Raises:
        UsageError: there is no route to that address.
    """
    parts = urlsplit(url)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 443))  # a datagram socket only chooses its route
            return str(probe.getsockname()[0])
    except OSError as error:
        hint = "set CONVOY_ADDRESS to this machine's address"
        raise UsageError(f"no route to {parts.hostname}: {error}; {hint}") from None


def interface_of(address: str) -> str:
    """Returns the name of the network interface that has this address.

    Raises:
        UsageError: no interface of this machine has it.
    """
    found = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    if address not in found:
        addresses = ", ".join(own for own in found if own.count(".") == 3)
        raise UsageError(f"{address} is no address of this machine (CONVOY_ADDRESS, --address); it has {addresses}")
    return found[address]


def free_port(address: str) -> int:
    """Returns a port that is free at this address now."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])
