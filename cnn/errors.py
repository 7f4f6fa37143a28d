"""Errors that `cnn` raises for faults of its input or its surroundings rather than of its code."""

from unicodedata import category


def escaped(text: str) -> str:
    """Returns the text with line breaks and control characters escaped: names of files may hold them."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in hidden else c for c in text)


class InputError(ValueError):
    """The data or the configuration cannot be used; the message says what is wrong, where, and what to do.

    Attributes:
        exit_status: what a command line should exit with: 2, the user's mistake.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class NotAvailable(RuntimeError):
    """A file was gone before it could be used, through no mistake in the input; the message says why.

    Attributes:
        exit_status: what a command line should exit with: 1.
    """

    exit_status = 1
