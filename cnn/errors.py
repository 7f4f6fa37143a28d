"""What `cnn` raises when its input or its surroundings, not its code, are wrong."""


class InputError(ValueError):
    """The data or the configuration cannot be used; the message says what is wrong, where, and what to do.

    Attributes:
        exit_status: what a command line should exit with: 2, the user's mistake.
    """

    exit_status = 2


class NotAvailable(RuntimeError):
    """Something was there and is gone before it could be used, through no mistake in the input; the message says why.

    Attributes:
        exit_status: what a command line should exit with: 1.
    """

    exit_status = 1
