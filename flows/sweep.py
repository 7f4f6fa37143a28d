"""The sweep flow: a search for the best configuration, which then goes the way of a training."""

from prefect import flow

from flows.run_names import training_name
from flows.summary import Summary
from tasks.config.run import RunConfig
from tasks.config.sweep import SweepRequest


@flow(name="sweep", flow_run_name=training_name, persist_result=False)
def sweep_flow(config: RunConfig, sweep: SweepRequest) -> Summary:
    """Trains configurations that differ in some keys, the better ones longer; registers and judges the best one.

    Args:
        config: what the space does not set.
        sweep: the space, or the run of a sweep that has stopped.

    Raises:
        Refused: a gate refused the data, or the best version.
    """
    from flows.pipeline import train_and_release  # as in `flows.train`

    return train_and_release(config, frozenset(), sweep=sweep)  # type: ignore[return-value]
