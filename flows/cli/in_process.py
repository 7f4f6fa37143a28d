"""Runs the flows `train`, `retrain` and `sweep` in this process, for the commands and for `flows.interface`."""

import os
from collections.abc import Iterable

from flows.cli.console import loading, print_line, servers_up
from flows.summary import Summary
from infra.machine import stopping
from tasks.config.run import RunConfig, Step
from tasks.config.sweep import SweepRequest


def check_before_servers(config: RunConfig) -> None:
    """Refuses what cannot succeed, as far as that is known before servers start.

    Raises:
        InputError, UsageError: the configuration cannot be used; see `check_early`.
    """
    from infra.sources.entries import catalogued, check_dataset

    name = config.dataset
    check_dataset(name)
    if os.path.isdir(name) and catalogued(name):
        print_line(f"{name} is the data set of that name; for the folder here, write ./{name}", error=True)
    with loading():
        from tasks.training.early_check import check_early
    check_early(config)


def run_training(
    config: RunConfig,
    refresh: Iterable[Step] = (),
    resume: str | None = None,
    *,
    only_if_changed: bool = False,
    force: bool = False,
    sweep: SweepRequest | None = None,
) -> Summary:
    """Starts the servers that do not run, then runs the flow `train`, `retrain` if `only_if_changed`, or `sweep`.

    Raises:
        Refused: a gate refused.
    """
    servers_up()
    with loading():
        import flows.candidate  # noqa: F401  # the flow would load it later, without a word
        from flows.retrain import retrain_flow
        from flows.sweep import sweep_flow
        from flows.train import train_flow
        from tasks.orchestration.progress import show_task_logs

    show_task_logs()
    stopping.check()
    if sweep:
        return sweep_flow(config, sweep)
    if only_if_changed:
        return retrain_flow(config, force, frozenset(refresh))
    return train_flow(config, frozenset(refresh), resume)
