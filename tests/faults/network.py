"""Hosts on this machine: network namespaces with addresses of their own, joined by a bridge. It takes root."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = 24
SERVERS = 254  # last byte of the bridge's own address, where the servers of this machine are reached

# Listens on ports of one address, and passes everything on to the same ports of another.
RELAY = """
import asyncio, sys
async def copy(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
def to(target, port):
    async def serve(reader, writer):
        try:
            there = await asyncio.open_connection(target, port)
        except OSError:
            return writer.close()
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
    return serve
async def main(host, target, *ports):
    servers = [await asyncio.start_server(to(target, int(port)), host, int(port)) for port in ports]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))
asyncio.run(main(*sys.argv[1:]))
"""


def why_not() -> str | None:
    """Why there can be no hosts on this machine; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces take root: run the tests as root"
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return "iproute2 is not installed: install Debian's package iproute2"
    return None


def ip(*words: str | int) -> str:
    """Call `ip`."""
    return subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True).stdout


class Host:
    """One namespace. Its processes are found, and killed, by it."""

    def __init__(self, name: str, address: str, bridge: str) -> None:
        self.name, self.address, self._link = name, address, f"{name}o"
        self._etc = Path("/etc/netns", name)  # `ip netns exec` shows its files in /etc
        self._etc.mkdir(parents=True)
        (self._etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # which says no at once
        ip("netns", "add", name)
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", self._link, "master", bridge, "up")
        ip("-n", name, "address", "add", f"{address}/{PREFIX}", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")

    def start(
        self, command: Sequence[str], *, folder: Path, log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a program here."""
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        """Of all processes here, but for the way to the servers."""
        return [pid for pid in map(int, ip("netns", "pids", self.name).split()) if not _is_relay(pid)]

    def cut(self) -> None:
        """From now on the bridge passes nothing to or from here, and nobody is told."""
        self._state("disabled")

    def mend(self) -> None:
        """Pass everything again."""
        self._state("forwarding")

    def shape(self, *discipline: str) -> None:
        """Have `tc` handle what goes out of here and what comes in, for example `netem loss 1%`."""
        for command in (
            ["tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *discipline],
            ["tc", "qdisc", "replace", "dev", self._link, "root", *discipline],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def lose_power(self) -> None:
        """End everything here at once; the others hear nothing of it, not even that connections are closed."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """End everything here at once."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)

    def remove(self) -> None:
        self.kill()
        ip("netns", "delete", self.name)  # its end of the link goes with it, and so does ours
        shutil.rmtree(self._etc)

    def _state(self, state: str) -> None:
        subprocess.run(["bridge", "link", "set", "dev", self._link, "state", state], check=True)


def _is_relay(pid: int) -> bool:
    try:
        return RELAY.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def relay(host: str, target: str, ports: Iterable[int], *prefix: str) -> subprocess.Popen[bytes]:
    """Start a relay; returns when it listens."""
    command = [*prefix, sys.executable, "-c", RELAY, host, target, *map(str, ports)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


@contextmanager
def network(count: int, ports: Sequence[int]) -> Iterator[list[Host]]:
    """So many hosts; what this machine serves on those ports of its loopback address, they find on theirs."""
    tag = f"cv{random.randrange(16**4):04x}"
    subnet = f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
    servers = f"{subnet}.{SERVERS}"
    hosts: list[Host] = []
    relays: list[subprocess.Popen[bytes]] = []
    ip("link", "add", tag, "type", "bridge")
    try:
        ip("address", "add", f"{servers}/{PREFIX}", "dev", tag)
        ip("link", "set", tag, "up")
        relays.append(relay(servers, "127.0.0.1", ports))
        for number in range(1, count + 1):
            hosts.append(Host(f"{tag}{number}", f"{subnet}.{number}", tag))
            # Addresses that servers hand out, such as MLflow's of artifacts, are those that they know themselves.
            relays.append(relay("127.0.0.1", servers, ports, "ip", "netns", "exec", hosts[-1].name))
        yield hosts
    finally:
        for host in hosts:
            host.remove()
        for process in relays:
            process.kill()
            process.wait()
        ip("link", "delete", tag)
