"""Commands that tidy up: `prune`, `doctor`."""

from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from flows.cli.console import loading, say, servers_up, terminal
from infra.settings import Settings
from tasks.config.retention import RetentionConfig, load_retention

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help=f"How long what is kept. Repeatable. Keys: {', '.join(RetentionConfig.model_fields)}.",
    ),
]


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    settings: SetOption = None,
    forget_unknown: Annotated[
        bool,
        typer.Option(
            "--forget-unknown",
            help="Go on although MLflow does not know some runs or promoted versions: they were deleted.",
        ),
    ] = False,
) -> None:
    """Remove old checkpoints, data, reports and cached files that nothing rests on.

    What a champion, an earlier champion, a version with an alias or a running training needs stays, whatever its age;
    so do all verdicts and promotions. Nothing is removed if the bucket holds data of runs that MLflow does not
    know: it may be another server than the one that they were made with.

    [dim]convoy prune --dry-run[/]
    [dim]convoy prune --set datasets_keep=2 --set unfinished_checkpoints_days=7[/]
    """
    retention = load_retention(settings or [])  # a wrong key should not have to wait for servers
    servers_up()
    with loading():
        from flows.prune import prune_flow

    result = prune_flow(retention, dry_run, forget_unknown)
    table = Table("would go" if dry_run else "removed", "objects", "size", box=None)
    for each in result.freed:
        table.add_row(each.kind, f"{each.count:,}", decimal(each.bytes))
    terminal().print(table if result.freed else "Nothing was old enough to go.")
    for note in result.notes:
        say(note)


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Settle what is found.")] = False,
) -> None:
    """Find what killed processes have left behind: runs that only seem to run, processes, half-written data, aliases.

    First it tries what the object store honours of S3, on small objects that it removes, and says what Convoy does
    without.

    Exit status 0 if the store has what is needed, and nothing was left behind or all was settled; else 1.

    [dim]convoy doctor --fix[/]
    """
    servers_up()
    with loading():
        from infra.storage.probe import probe
        from tasks.upkeep.doctor import find_orphans, settle

    capabilities = probe(Settings().bucket)
    table = Table("object storage", "", "without it, Convoy", box=None)
    for each in capabilities:
        lack = ("missing", "red") if each.needed else "no"
        word = Text("honoured") if each.honoured else Text.assemble(lack, f": {each.answer}")
        table.add_row(each.name, word, each.without if not each.honoured else "")
    terminal(width=160).print(table)
    lacking = [each.name for each in capabilities if each.needed and not each.honoured]

    found = find_orphans()
    settled = {(each.kind, each.what) for each in settle(found)} if fix else set()
    for finding in found:
        mark = "settled: " if (finding.kind, finding.what) in settled else ""
        say(f"{mark}{finding}")
    left = len(found) - len(settled)
    if not found:
        say("Nothing was left behind.")
    if left:
        say(f"{left} to settle: {'see above' if fix else '`convoy doctor --fix` does'}", error=True)
    if lacking:
        say(f"convoy: this object store cannot be used: it lacks {', '.join(lacking)}", error=True)
    if left or lacking:
        raise typer.Exit(1)
