"""Chooses ports on the loopback address; a server keeps its ports from one start to the next."""

import random
import socket
from collections.abc import Iterable
from functools import partial

import psutil

from infra.records import Record

PORT_RANGE = range(20_000, 30_000)  # below every system's range for outgoing connections, which come and go
ADMIN_GRPC_OFFSET = 10_000  # SeaweedFS's own worker always expects the port there, whatever the options name


class Ports(Record):
    """The ports of the local servers. SeaweedFS opens ten; it would choose those that are not given."""

    s3: int = 8333
    s3_grpc: int = 0
    master: int = 0
    master_grpc: int = 0
    volume: int = 0
    volume_grpc: int = 0
    filer: int = 0
    filer_grpc: int = 0
    admin: int = 0
    mlflow: int = 5000
    prefect: int = 4200

    @property
    def admin_grpc(self) -> int:
        """The port that SeaweedFS derives from `admin`."""
        return self.admin + ADMIN_GRPC_OFFSET

    @property
    def seaweedfs(self) -> tuple[int, ...]:
        """All ports that SeaweedFS opens."""
        return (*(getattr(self, name) for name in SEAWEEDFS), self.admin_grpc)


SEAWEEDFS = tuple(name for name in Ports.model_fields if name not in ("mlflow", "prefect"))


def is_free(port: int, *, on_loopback: bool = False) -> bool:
    """Checks that no process listens on `port`, on any address of this machine, and that a server could.

    Args:
        on_loopback: a connection from another address of this machine may have the port as its own. MLflow and Prefect
            can listen then; SeaweedFS refuses to.
    """
    dual = socket.has_dualstack_ipv6()
    if _can_listen("", port, dual):
        return True
    return on_loopback and not is_listened_on(port) and _can_listen("127.0.0.1", port, dual=False)


def is_listened_on(port: int) -> bool:
    """Checks whether any process listens on `port`, on any address of this machine."""
    connections = psutil.net_connections(kind="tcp")
    return any(each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,) for each in connections)


def _can_listen(address: str, port: int, dual: bool) -> bool:
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family, dualstack_ipv6=dual):
            return True
    except OSError:
        return False


def choose(wanted: Ports, *, kept: Iterable[str], preferred: dict[str, int]) -> Ports:
    """Chooses ports that are free now: those of `wanted` if they are free, else random ones.

    Args:
        wanted: the ports used last, or the defaults.
        kept: names of the ports that running servers of this state folder hold; they do not change.
        preferred: ports that the user has set, by name; used if they are free.
    """
    kept = set(kept)
    chosen = {name: port for name, port in wanted.model_dump().items() if name in kept}
    taken = set(chosen.values())
    for name, last in wanted.model_dump().items():
        if name in kept:
            continue
        for port in (preferred.get(name), last, *random.SystemRandom().sample(PORT_RANGE, 200)):
            opened = {port, port + ADMIN_GRPC_OFFSET} if name == "admin" and port else {port}
            free = partial(is_free, on_loopback=name not in SEAWEEDFS)
            reserved = set(preferred.values()) - {preferred.get(name)}
            if port and not opened & (taken | reserved) and all(map(free, opened)):
                break
        chosen[name] = port
        taken |= opened
    return Ports(**chosen)
