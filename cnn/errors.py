"""What `cnn` raises when its input, not its code, is wrong."""


class InputError(ValueError):
    """The data or the configuration cannot be used; the message says what is wrong, where, and what to do.

    Attributes:
        exit_status: what a command line should exit with: 2, the user's mistake.
    """

    exit_status = 2
