"""Commands that clean up: `prune`, `doctor`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from flows.cli.console import JsonOption, loading, print_json, print_line, servers_up, terminal
from flows.cli.options import set_option
from infra.settings import Settings
from tasks.config.retention import RetentionConfig, load_retention

if TYPE_CHECKING:
    from infra.storage.probe import Capability
    from tasks.upkeep.doctor import Finding

SetOption = Annotated[
    list[str] | None,
    set_option(f"Change how long something is kept. Repeatable. Keys: {', '.join(RetentionConfig.model_fields)}."),
]


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    settings: SetOption = None,
    forget_unknown: Annotated[
        bool,
        typer.Option(
            "--forget-unknown",
            help="Continue although MLflow does not know some runs or promoted versions: they were deleted.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove old checkpoints, data, reports and cached files that are not in use.

    Data that a champion, an earlier champion, a version with an alias or a running training needs stay, whatever their
    age; so do all verdicts and promotions. Nothing is removed if the bucket holds data of runs that MLflow does not
    know: this may be another MLflow server than the one that recorded them.

    [dim]convoy prune --dry-run[/]
    [dim]convoy prune --set datasets_keep=2 --set unfinished_checkpoints_days=7[/]
    """
    retention = load_retention(settings or [])  # a wrong key is reported before servers start
    servers_up()
    with loading():
        from flows.prune import prune_flow

    result = prune_flow(retention, dry_run, forget_unknown)
    if as_json:
        print_json(result)
        return
    table = Table("would be removed" if dry_run else "removed", "objects", "size", box=None)
    for each in result.freed:
        table.add_row(each.kind, f"{each.count:,}", decimal(each.bytes))
    terminal().print(table if result.freed else "Nothing was old enough to be removed.")
    for note in result.notes:
        print_line(note)


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Settle the findings.")] = False, as_json: JsonOption = False
) -> None:
    """Find leftovers of killed processes: runs that only seem to run, processes, half-written data, wrong aliases.

    First it tests which features of S3 the object store supports, with small objects that it removes, and prints what
    Convoy does without them.

    Exit status 0 if the store has all that Convoy needs and no finding is left; otherwise 1.

    [dim]convoy doctor --fix[/]
    """
    servers_up()
    with loading():
        from infra.storage.probe import probe
        from tasks.upkeep.doctor import find_orphans, settle

    capabilities = probe(Settings().bucket)
    lacking = [each.name for each in capabilities if each.needed and not each.honoured]

    def look() -> "dict[tuple[str, str], Finding]":
        return {(finding.kind, finding.what): finding for finding in find_orphans()}

    found = left = look()
    for _ in range(2 if fix and found else 0):  # to settle one may settle another, or reveal one
        settle(left.values())
        left = look()
        found = found | left
        if not left:
            break
    if as_json:
        findings = [dict(each) | {"settled": key not in left} for key, each in found.items()]
        print_json({"object_storage": capabilities, "findings": findings})
    else:
        _print_capabilities(capabilities)
        for key, finding in found.items():
            print_line(f"{'settled: ' if key not in left else ''}{finding}")
        if not found:
            print_line("Nothing was left behind.")
    if left:
        print_line(f"{len(left)} to settle: {'see above' if fix else '`convoy doctor --fix` does'}", error=True)
    if lacking:
        print_line(f"convoy: this object store cannot be used: it lacks {', '.join(lacking)}", error=True)
    if left or lacking:
        raise typer.Exit(1)


def _print_capabilities(capabilities: "list[Capability]") -> None:
    table = Table("object storage", "", "without it, Convoy", box=None)
    for each in capabilities:
        missing = ("missing", "red") if each.needed else "no"
        answer = Text("supported") if each.honoured else Text.assemble(missing, f": {each.answer}")
        table.add_row(each.name, answer, "" if each.honoured else each.without)
    terminal(width=160).print(table)
