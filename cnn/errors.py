"""Errors that `cnn` raises when its input or its environment is at fault rather than its code."""

from unicodedata import category


def escaped(text: str) -> str:
    """Returns the text with line breaks and control characters escaped: file names may contain them."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in hidden else c for c in text)


class InputError(ValueError):
    """The data or the configuration cannot be used; the message says what is wrong, where, and what to do."""

    exit_status = 2
    """Exit status of a command that ends with this error: the user made a mistake."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class NotAvailable(RuntimeError):
    """A file disappeared before it could be used, through no mistake in the input; the message says why."""

    exit_status = 1
    """Exit status of a command that ends with this error."""
