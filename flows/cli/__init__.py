"""The command line: one module per panel of `convoy --help`."""


def main() -> None:
    """Runs the command line; only then is it loaded, and listens for signals."""
    from flows.cli.app import main as run

    run()
