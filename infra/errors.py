"""The exceptions of `infra`; the command line prints the message as one line and exits with `exit_status`."""

import re
from unicodedata import category


def escaped(text: str) -> str:
    """Escapes line breaks and control characters, which file names may contain."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in hidden else c for c in text)


def one_line(text: object) -> str:
    """Returns a text or an error's message in one line, with single blanks."""
    return " ".join(str(text).split())


def counted(count: int, noun: str) -> str:
    """Returns `1 file`, `2 files`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def without_login(address: str) -> str:
    """Removes user and password from an address, or from each address in a text."""
    with_slash = r"[^/\s:\[]*:(?!\d*/)\S*"  # a password that should have been escaped, but neither port nor IPv6
    return re.sub(rf"(^[^/]*//)[^/]*@|(?<=//)([^/\s]*|{with_slash})@", r"\1", address)


class UsageError(ValueError):
    """The request names something that does not exist or is not allowed; the message says what to do instead."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class GateRefused(RuntimeError):
    """Data or a model are not good enough. The gate worked as intended, and nothing has changed."""

    exit_status = 3


class ServiceError(RuntimeError):
    """A server, mirror or store failed, refused or could not be reached, after the stated retries."""

    exit_status = 1


class Outage(ServiceError):
    """A server, the network or this machine is down, overloaded or restarting: a retry may succeed later."""

    resumable = True
    """Whether a training that ends with this error goes on by itself, if a deployment has started it."""
