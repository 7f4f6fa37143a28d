"""The sweep flow: a search for the best configuration, which then goes the way of a training."""

from prefect import flow

from flows.run_names import training_name
from flows.summary import Summary
from tasks.config.run import RunConfig
from tasks.config.sweep import SweepRequest
from tasks.orchestration.failure import failure_told


@flow(name="sweep", flow_run_name=training_name, persist_result=False)
def sweep_flow(config: RunConfig, sweep: SweepRequest) -> Summary:
    """Trains configurations that differ in some keys, the better ones longer; registers and judges the best one.

    Args:
        config: what the space does not set.
        sweep: the space, or the run of a sweep that has stopped.

    Raises:
        Refused: a gate refused the data, or the best version.
    """
    with failure_told(minor=False):  # code that cannot be loaded, too; not above, since a deployment does not need it
        from flows.pipeline import train_and_release

    return train_and_release(config, frozenset(), sweep=sweep)  # type: ignore[return-value]
