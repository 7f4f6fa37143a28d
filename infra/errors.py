"""What `infra` raises; the command line prints the message as one line and exits with `exit_status`."""

import re
from unicodedata import category


def escaped(text: str) -> str:
    """Returns the text with line breaks and control characters escaped: names of files may hold them."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in hidden else c for c in text)


def one_line(text: object) -> str:
    """Returns what is said, an error perhaps, with its line breaks and runs of blanks made single blanks."""
    return " ".join(str(text).split())


def without_login(address: str) -> str:
    """Returns the address without user and password, fit to be shown."""
    return re.sub(r"^([^/]*//)[^/]*@", r"\1", address)


class UsageError(ValueError):
    """The user asked for something that does not exist or is not allowed; the message says what to do instead."""

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class GateRefused(RuntimeError):
    """Data or a model are not good enough; that was found out in good order, and everything is where it was."""

    exit_status = 3


class ServiceError(RuntimeError):
    """A server, mirror or store failed, refused or could not be reached, after the stated retries."""

    exit_status = 1


class Outage(ServiceError):
    """A server or the way to it is down, overloaded or restarting: the same may well succeed in a while."""
