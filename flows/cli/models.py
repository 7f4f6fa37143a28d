"""Commands about the versions of models: `models`, `promote`, `rollback`, `history`, `compare`."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

from flows.cli.console import (
    JsonOption,
    loading,
    print_json,
    print_line,
    print_whole,
    servers_to_read,
    servers_up,
    terminal,
)
from flows.cli.options import set_option
from infra.errors import GateRefused, ServiceError

if TYPE_CHECKING:
    from infra.tracking.model_registry import RegisteredVersion
    from infra.tracking.promotion_history import Promotion
    from tasks.config.gates import GateConfig
    from tasks.release.quality.verdict import Verdict

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a registered model.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="Number, or @alias.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the history.")]
REFERENCE_HELP = "NAME/VERSION, NAME@ALIAS, or NAME for its champion."
SetOption = Annotated[
    list[str] | None,
    set_option("A condition of the quality gate: -s mode=non-inferior. Repeatable."),
]


def models(as_json: JsonOption = False) -> None:
    """List the registered models: champion, its accuracy on the test split and its age, number of versions.

    Starts no server: `convoy up` does.
    """
    servers_to_read()
    from infra.storage.object_store import open_bucket
    from tasks.release.model_list import list_models

    found = list_models(open_bucket())
    if as_json:
        print_json(found)
        return
    table = Table("model", "champion", "accuracy", "age", "versions", box=None)
    for model in found:
        table.add_row(*model.cells(datetime.now(UTC)))
    print_whole(table if found else "No model yet; `convoy train` registers one.")
    for model in found:
        if model.note:
            print_line(model.note)


def promote(
    name: NameArgument,
    version: VersionArgument,
    force: Annotated[bool, typer.Option("--force", help="Override the gates; needs --reason.")] = False,
    reason: ReasonOption = "",
    judge: Annotated[bool, typer.Option("--judge", help="Score it against the present champion first.")] = False,
    settings: SetOption = None,
) -> None:
    """Make a version the champion, if it passed its gates against the present one.

    Of several simultaneous promotions, one wins; the others report which. Exit status 3: a gate refused. The conditions
    of --judge are those of the version's training, unless --set changes them.

    [dim]convoy promote fashion-mnist 4[/]
    [dim]convoy promote fashion-mnist 4 --force --reason "the only one that knows the new sizes"[/]
    """
    from tasks.config.gates import load_gate

    scored = judge or bool(settings)
    conditions = load_gate(settings or []) if scored else None  # a wrong key is reported before servers start
    promotion = promote_named(
        name, version, conditions, force, reason, lambda verdict: terminal().print(Markdown(verdict.markdown()))
    )
    print_line(f"{name} was {promotion}")


def promote_named(
    name: str,
    version: str,
    conditions: "GateConfig | None",
    force: bool,
    reason: str,
    judged: "Callable[[Verdict], None]" = lambda verdict: None,
) -> "Promotion":
    """Does what `promote` describes, with its servers.

    Args:
        conditions: changes of the quality gate's conditions, to score the version against the present champion first;
            None: do not.
        judged: is called with the verdict, before a gate may refuse.
    """
    from tasks.config.gates import check_override

    check_override(force, reason)
    servers_up()
    from infra.storage.object_store import open_bucket
    from infra.tracking.model_versions import find_version
    from infra.tracking.promotion_history import standing_champion
    from tasks.release.promote import promote_version

    separator = "" if version.startswith("@") else "/"
    found = find_version(f"{name}{separator}{version}")
    if conditions and found != standing_champion(open_bucket(create=True), name).version:  # not against itself
        with loading():
            from tasks.release.quality_gate import conditions_of, judge_version, publish

        verdict = judge_version(found, conditions_of(found, conditions))
        publish(found, verdict)
        judged(verdict)
        # A loosened condition overrides the gates as --force does: the history must show it.
        changed = conditions.model_dump(exclude_unset=True, mode="json")
        reason = reason or (f"judged with {json.dumps(changed)}" if changed else "")
    try:
        promotion = promote_version(found, force=force, reason=reason)
    except GateRefused:
        _renew_pages(found)
        raise
    _renew_pages(found)
    return promotion


def _renew_pages(before: "RegisteredVersion") -> None:
    """Renews card and report of a version if its verdict, or a person's decision about it, has changed.

    They do not change what was done, so a server that fails now is a warning only.
    """
    from infra.tracking.model_versions import find_version

    try:
        now = find_version(before.address)
        if now.tags == before.tags:
            return
        with loading():
            from tasks.release.approval import show_decision
            from tasks.release.report_page import make_page

        if now.record.approval != before.record.approval:
            show_decision(now)
        make_page(find_version(now.address))
    except ServiceError as error:
        print_line(f"the report of {before.address} is not up to date: {error}", error=True)


def rollback(name: NameArgument, reason: ReasonOption = "") -> None:
    """Restore the champion before the present one; a second call restores the one before that.

    [dim]convoy rollback fashion-mnist[/]
    """
    servers_up()
    from infra.storage.object_store import open_bucket
    from infra.tracking.model_registry import check_model_exists
    from infra.tracking.promotion_history import newest
    from infra.tracking.promotion_history import rollback as roll_back

    store = open_bucket(create=True)
    if newest(store, name) is None:
        check_model_exists(name)
    print_line(f"{name} was {roll_back(store, name, reason=reason)}")


def history(name: NameArgument, as_json: JsonOption = False) -> None:
    """List every change of a model's champion, the newest first; below, versions that were not approved, and aliases
    in MLflow that differ from it.

    Starts no server and changes nothing: `convoy up` and `convoy doctor --fix` do.
    """
    servers_to_read()
    from infra.storage.object_store import open_bucket
    from infra.tracking.model_registry import check_model_exists, search_versions
    from infra.tracking.promotion_history import history as changes
    from infra.tracking.promotion_history import misplaced_aliases

    store = open_bucket()
    entries = changes(store, name)
    if not entries:
        check_model_exists(name)
    decisions = {
        version.version: said
        for version in search_versions(name=name)
        if (said := version.record.approval_sentence)
        and not any(entry.is_of(version.version, version.run_id) for entry in entries)
    }
    misplaced = misplaced_aliases(store, name)
    if as_json:
        print_json({"changes": entries[::-1], "not_promoted": decisions, "misplaced_aliases": misplaced})
        return
    table = Table("", "when (UTC)", "change", "from", "to", "who", "why", "verdict", box=None)
    for entry in reversed(entries):
        when = f"{entry.when:%Y-%m-%d %H:%M:%S}"
        change = entry.action + (" (forced)" if entry.forced else "")
        versions = (entry.from_version or "", entry.to_version)
        table.add_row(str(entry.number), when, change, *versions, entry.who, entry.reason, entry.verdict_summary)
    if entries:
        terminal(width=None if terminal().is_terminal else 240).print(table)
    else:
        print_line(f"{name} has no champion yet; `convoy promote {name} VERSION` makes one.")
    for version, said in decisions.items():
        print_line(f"version {version}, not promoted: {said}")
    for change in misplaced:
        print_line(f"alias in MLflow differs: {change}; `convoy doctor --fix` repairs it")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The challenger: {REFERENCE_HELP}")],
    b: Annotated[str, typer.Argument(metavar="B", help=f"The version to compare it with: {REFERENCE_HELP}")],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions on the test split of A's dataset, image by image, as the quality gate does.

    The conditions are those of A's training, unless --set changes them. Nothing is promoted, and no server is started.
    Exit status 0, whatever the verdict.

    [dim]convoy compare fashion-mnist@challenger fashion-mnist@champion[/]
    """
    from tasks.config.gates import load_gate

    verdict = compare_named(a, b, load_gate(settings or []))  # a wrong key is reported before servers are needed
    if as_json:
        print_json(verdict)
    else:
        terminal().print(Markdown(verdict.markdown()))


def compare_named(a: str, b: str, conditions: "GateConfig") -> "Verdict":
    """Does what `compare` describes, with its servers.

    Args:
        conditions: changes of the quality gate's conditions.
    """
    servers_to_read()
    with loading():
        from infra.storage.object_store import open_bucket
        from infra.tracking.promotion_history import find_model
        from tasks.release.quality_gate import compare as judge
        from tasks.release.quality_gate import conditions_of

    store = open_bucket()
    challenger = find_model(store, a)
    return judge(challenger, find_model(store, b), conditions_of(challenger, conditions))
