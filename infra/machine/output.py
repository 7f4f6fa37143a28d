"""Keeps a process working when its standard output or error cannot be written."""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal


@contextmanager
def outlive_readers(*names: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Lets the block continue when nothing reads its output any more, or the output's disk is full.

    Output that cannot be written is dropped, also in processes started afterwards. A training's log is in Prefect too.
    """
    with ExitStack() as stack:
        for name in names:
            stream = getattr(sys, name)
            if stream is None or isinstance(stream, _Lenient):
                continue
            lenient = _Lenient(stream)
            setattr(sys, name, lenient)
            stack.callback(setattr, sys, name, stream)
            for console in _consoles_of_logs():
                if console.file is stream:  # Rich would end the program on an error
                    console.file = lenient
                    stack.callback(setattr, console, "file", stream)
            stack.callback(lenient.end)
        yield


def _consoles_of_logs() -> list[Any]:
    """Returns the Rich consoles that log handlers, such as Prefect's, write to."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return [handler.console for handler in handlers if hasattr(handler, "console")]


class _Lenient:
    """A text stream that drops output that cannot be written, without an error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._give_up_unless_full(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up_unless_full(error)

    def end(self) -> None:
        """Writes or drops what is buffered: else the interpreter writes it at exit and prints the error."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up_unless_full(self, error: Exception) -> None:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):  # a disk may have space again
            self._give_up()

    def _give_up(self) -> None:
        """Points the descriptor at /dev/null, for buffered output and for child processes."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
