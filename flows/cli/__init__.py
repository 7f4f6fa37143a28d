"""The command line: one module per subject."""


def main() -> None:
    """Runs the command line. It is imported only here, since the import installs signal handlers."""
    from flows.cli.app import main as run

    run()
