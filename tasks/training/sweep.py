"""Searches among configurations by successive halving, with trials that are paused at a rung and go on from there.

Optuna proposes the values of the trials, a share of them at a time, and learns how each of these did at the first rung,
in the order of their numbers. At each rung the best go on (Jamieson and Talwalkar, 2016). What is proposed and who goes
on depends on the trials' scores only, and these on seeds: not on how many trials run at a time, nor on interruptions.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from pydantic import Field, ValidationError
from scipy.stats import spearmanr

from cnn.distributed.process_group import check_devices, device_count
from cnn.distributed.world_size import default_world_size
from cnn.errors import InputError
from infra.errors import UsageError
from infra.records import Record
from infra.storage import bucket_layout
from infra.storage.object_store import open_bucket
from infra.tracking import mlflow_runs, tags
from infra.tracking.promotion_history import this_user
from tasks.config.run import RunConfig, with_network_options
from tasks.config.sweep import Range, SweepConfig, Value, contains, trial_config, value_of
from tasks.data.dataset import DatasetRef
from tasks.orchestration.cancellation import STOPPED
from tasks.orchestration.model_lease import model_lease
from tasks.orchestration.progress import Advance, progress, run_logger
from tasks.orchestration.retries import outlast
from tasks.orchestration.step import step
from tasks.training.liveness import hold_run_lock
from tasks.training.protocol.job import Event, spare_outcome
from tasks.training.runs.tracked_run import Interrupted, flow_tags, tracked_run
from tasks.training.train import TrainingFailed, train_to

RECORD = "sweep.json"  # artifact of the sweep's run
RUNG_METRIC = "sweep/rung_{}"


class SweepRecord(Record, extra="forbid"):
    """What a sweep was started with, for its resume."""

    config: RunConfig
    dataset: DatasetRef
    sweep: SweepConfig


class SweepResult(Record):
    """What a sweep has found. Scripts depend on these names."""

    run_id: str
    """MLflow run of the sweep; its trials are below it."""

    trials: int
    failed: int = 0
    best_trial: int
    values: dict[str, Value]
    """Of the best trial, by key."""

    score: float
    """The best trial's metric on the validation split, of the weights that it keeps."""

    epochs: int
    """Trained by all trials together, as far as they have scores."""

    grid_epochs: int
    """As they would train if each went to its end."""

    rank_correlation: tuple[float | None, ...] = ()
    """Per rung but the last: Spearman's correlation with the next one, over the trials that went on; None if undefined.
    """


class Trial(Record):
    """One configuration of a sweep."""

    number: int
    values: dict[str, Value]
    run_id: str | None = None
    scores: dict[int, float] = Field(default_factory=dict)
    """The metric by the number of the rung, from 1."""

    failed: bool = False


def read_sweep_record(run_id: str) -> SweepRecord:
    """Returns what a sweep was started with.

    Raises:
        UsageError: the run is no sweep.
    """
    if mlflow_runs.run_tags(run_id).get(tags.SWEEP) != run_id:
        raise UsageError(f"run {run_id} is no sweep; MLflow shows sweeps as runs with trials below them")
    with TemporaryDirectory() as folder:
        written = mlflow_runs.fetch_artifacts(run_id, RECORD, Path(folder)).read_bytes()
    try:
        return SweepRecord.model_validate_json(written)
    except ValidationError as error:
        raise UsageError(f"sweep {run_id} was made by another version of Convoy: {error.errors()[0]['msg']}") from None


def at_a_time(config: RunConfig, asked: int | None) -> int:
    """Returns how many trials run at a time, on which the result does not depend.

    Raises:
        InputError: this machine has fewer GPUs than `ranks`.
        UsageError: several trials at a time are asked for on GPUs.
    """
    check_devices(config.ranks or 1)
    if torch.cuda.is_available():
        if (asked or 1) > 1:
            raise UsageError("on GPUs, trials run one at a time, each on all GPUs that its lanes allow")
        return 1
    return asked or max(1, device_count() // (config.ranks or 1))


def _ranks(config: RunConfig) -> int:
    """Returns the ranks of a trial: all GPUs that its lanes allow, or one core, unless `ranks` is set."""
    return config.ranks or (default_world_size(config.lanes, device_count()) if torch.cuda.is_available() else 1)


class Sweep:
    """A sweep under way.

    Args:
        run_id: the sweep's run.
        advance: adds epochs to what is done, and shows a note.
        trials_at_a_time: trials that run at the same time.
    """

    def __init__(self, run_id: str, record: SweepRecord, advance: Advance, trials_at_a_time: int) -> None:
        self._run_id, self._record, self._advance = run_id, record, advance
        self._at_a_time = trials_at_a_time
        self._sign = 1 if record.sweep.metric == "val/accuracy" else -1
        self._rungs = record.sweep.rungs(record.config.epochs)
        self._earlier = {trial.number: trial for trial in _trials_of(run_id)}

    def search(self) -> list[Trial]:
        """Returns all trials, in the order of their numbers; raises UsageError if each failed."""
        trials = self._proposed()
        going = trials
        for number, rung in enumerate(self._rungs[1:], start=2):
            going = self.best(going, number - 1)[: rung.trials]
            scored = {trial.number: trial for trial in self._trained(sorted(going, key=lambda t: t.number), number)}
            trials = [scored.get(trial.number, trial) for trial in trials]
            going = list(scored.values())
        if not self.best(trials, len(self._rungs)):
            raise UsageError(f"each of the trials that were left failed; their runs below {self._run_id} say why")
        return trials

    def best(self, trials: Sequence[Trial], rung: int) -> list[Trial]:
        """Returns the trials that have a score at a rung, the best first, of equal ones that with the lower number."""
        scored = [trial for trial in trials if rung in trial.scores]
        return sorted(scored, key=lambda trial: (-self._sign * trial.scores[rung], trial.number))

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Returns all trials: those that got furthest first, of these the best."""
        ranked = [trial for rung in range(len(self._rungs), 0, -1) for trial in self.best(trials, rung)]
        return list({trial.number: trial for trial in (*ranked, *trials)}.values())

    def result(self, trials: Sequence[Trial]) -> SweepResult:
        """Returns what the trials have found."""
        last, epochs = len(self._rungs), self._record.config.epochs
        best = self.best(trials, last)[0]
        return SweepResult(
            run_id=self._run_id,
            trials=len(trials),
            failed=sum(trial.failed for trial in trials),
            best_trial=best.number,
            values=best.values,
            score=best.scores[last],
            epochs=sum(self._rungs[rung - 1].epochs for trial in trials for rung in trial.scores),
            grid_epochs=len(trials) * epochs,
            rank_correlation=tuple(_correlation(trials, rung) for rung in range(1, last)),
        )

    def _proposed(self) -> list[Trial]:
        """Returns all trials with their scores at the first rung."""
        import optuna  # with SQLAlchemy's tables it takes a second

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sweep, config = self._record.sweep, self._record.config
        together = math.ceil(sweep.trials / sweep.eta)
        sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=together, constant_liar=True)
        study = optuna.create_study(sampler=sampler, direction="maximize" if self._sign > 0 else "minimize")
        own = {key: value_of(config, key) for key in sweep.space}
        if all(contains(values, own[key]) for key, values in sweep.space.items()):
            study.enqueue_trial(own)  # the configuration as it is
        spaces = {key: _distribution(values) for key, values in sweep.space.items()}
        trials: list[Trial] = []
        while len(trials) < sweep.trials:
            asked = [study.ask(spaces) for _ in range(min(together, sweep.trials - len(trials)))]
            new = [self._trial(len(trials) + 1 + place, each.params) for place, each in enumerate(asked)]
            new = self._trained(new, 1)
            for each, trial in zip(asked, new, strict=True):
                if 1 in trial.scores:  # what fails at a later rung, before an interruption, has been told its score too
                    study.tell(each, trial.scores[1])
                else:
                    study.tell(each, state=optuna.trial.TrialState.FAIL)
            trials += new
        return trials

    def _trial(self, number: int, values: dict[str, Value]) -> Trial:
        """Returns a proposed trial, with what it has done before an interruption.

        Raises:
            UsageError: it had other values then.
        """
        earlier = self._earlier.get(number)
        if earlier and earlier.values != values:
            raise UsageError(
                f"sweep {self._run_id} cannot go on here: its trial {number} was {earlier.values}, and this version of "
                f"Optuna proposes {values}; use the libraries with which it began, or begin anew"
            )
        return earlier or Trial(number=number, values=values)

    def _trained(self, trials: Sequence[Trial], rung: int) -> list[Trial]:
        """Trains the trials to a rung, some at a time; returns them with their scores, in the same order."""
        with ThreadPoolExecutor(self._at_a_time, thread_name_prefix="trial") as pool:
            futures = [
                pool.submit(copy_context().run, self._train, trial, self._config_of(trial), rung) for trial in trials
            ]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [each for each in futures if each.done() and each.exception()]
            pool.shutdown(wait=False, cancel_futures=bool(failed))
            return [future.result() for future in (*failed, *futures)][len(failed) :]

    def _config_of(self, trial: Trial) -> RunConfig | None:
        """Returns a trial's configuration; None, with a warning, if its values do not go together."""
        try:
            return with_network_options(trial_config(self._record.config, trial.values))
        except (InputError, UsageError) as error:
            run_logger().warning("trial %d is left out, with %s: %s", trial.number, trial.values, error)
            return None

    def _train(self, trial: Trial, config: RunConfig | None, rung: int) -> Trial:
        begin, epoch, _ = self._rungs[rung - 1]
        name = f"trial {trial.number} of {self._record.sweep.trials}"
        if config is None:
            trial = trial.model_copy(update={"failed": True})
        if config is None or trial.failed or rung in trial.scores:
            self._advance(epoch - begin, f"{name} has been there")
            return trial
        done = 0.0

        def show(event: Event) -> None:
            nonlocal done
            if event.warning:
                run_logger().warning("%s: %s", name, event.warning)
            if event.total_steps:
                reached = min(self._record.config.epochs * event.step / event.total_steps, epoch) - begin
                self._advance(max(reached - done, 0.0))
                done = max(done, reached)
            else:
                self._advance(0.0)  # which looks for signals

        epochs = f"epoch {epoch}" if epoch == begin + 1 else f"epochs {begin + 1} to {epoch}"
        trained = trial_step.with_options(task_run_name=f"{name}, {epochs}")(
            self._run_id, self._record, trial, config, rung, epoch, show
        )
        score = trained.scores.get(rung)
        what = "failed" if score is None else f"{self._record.sweep.metric} {score:.4f}"
        self._advance(epoch - begin - done, f"{name}: {what} after epoch {epoch}")
        return trained


@step("trial")
def trial_step(
    sweep_run: str,
    record: SweepRecord,
    trial: Trial,
    config: RunConfig,
    rung: int,
    epoch: int,
    show: Callable[[Event], None],
) -> Trial:
    """Trains a trial to the end of an epoch; returns it with its score there, or as failed.

    Raises:
        Cancelled, Stopped, Interrupted, TrainingFailed, ServiceError: it can go on later.
    """
    if not trial.run_id:  # a try before an outage may have begun it
        trial = next((each for each in _trials_of(sweep_run) if each.number == trial.number), trial)
    told = {
        tags.PARENT: sweep_run,
        tags.SWEEP: sweep_run,
        tags.SWEEP_TRIAL: str(trial.number),
        tags.SWEEP_VALUES: json.dumps(trial.values),
    }
    try:
        with tracked_run(config, record.dataset, trial.run_id, sweep=told) as run:
            trial = trial.model_copy(update={"run_id": run.run_id})
            outcome = train_to(run, record.dataset, config, epoch, ranks=_ranks(config), show=show)
            score = outcome.val_accuracy if record.sweep.metric == "val/accuracy" else outcome.val_loss
            if not math.isfinite(score):
                why = f"{record.sweep.metric} is {score} after epoch {epoch}"
                raise TrainingFailed(why, exit_status=1, resumable=False, diverged=True)
            outlast(partial(mlflow_runs.log_metrics, run.run_id, {RUNG_METRIC.format(rung): score}, step=epoch))
            reached = f"rung {rung} of its sweep: {record.sweep.metric} {score:.4f}"
            outlast(partial(mlflow_runs.set_tags, run.run_id, {tags.RESULT: reached}))
    except InputError as error:  # its values do not suit the images
        if trial.run_id:
            raise
        run_logger().warning("trial %d is left out, with %s: %s", trial.number, trial.values, error)
        return trial.model_copy(update={"failed": True})
    except TrainingFailed as failed:
        if not failed.diverged or not trial.run_id:
            raise
        run_logger().warning("trial %d is left out, with %s: %s", trial.number, trial.values, failed)
        outlast(partial(mlflow_runs.set_tags, trial.run_id, {tags.SWEEP_FAILED: str(failed)}))
        return trial.model_copy(update={"failed": True})
    return trial.model_copy(update={"scores": {**trial.scores, rung: score}})


def sweep_best(record: SweepRecord, sweep_run: str | None, asked: int | None) -> tuple[RunConfig, str, SweepResult]:
    """Runs or resumes a sweep; returns the best trial's configuration, its run, and what the sweep has found.

    The best trial is trained to its end; its run can be resumed to evaluate and register it.

    Args:
        sweep_run: the run of a sweep to resume.
        asked: trials to run at a time, None for as many as this machine can.
    """
    total = record.sweep.cost(record.config.epochs)
    count = at_a_time(record.config, asked)
    with (
        _sweep_run(record, sweep_run) as run_id,
        spare_outcome(),
        progress(f"Sweep of {record.sweep.trials} trials", total, unit="epochs", artifact="sweep") as advance,
    ):
        sweep = Sweep(run_id, record, advance, count)
        trials = sweep.search()
        result = sweep.result(trials)
        _publish(result, sweep.ranked(trials), record.sweep.metric)
        best = next(trial for trial in trials if trial.number == result.best_trial)
        assert best.run_id
        version = mlflow_runs.run_tags(best.run_id).get(tags.MODEL_VERSION)
        if version and mlflow_runs.run_status(best.run_id) == "FINISHED":
            raise UsageError(f"sweep {result.run_id} has finished: its best trial is {version}")
        for trial in trials:
            if trial.run_id and not trial.failed and trial is not best:
                outlast(partial(mlflow_runs.end_run, trial.run_id, "FINISHED"))
        outlast(partial(mlflow_runs.set_tags, best.run_id, {tags.SWEEP_BEST: "true"}))
    return with_network_options(trial_config(record.config, best.values)), best.run_id, result


@contextmanager
def _sweep_run(record: SweepRecord, run_id: str | None) -> Iterator[str]:
    """Opens the run of a sweep, and closes it."""
    sweep, resumed = record.sweep, run_id is not None
    if run_id is None:
        space = {f"space.{key}": _shown(values) for key, values in sweep.space.items()}
        run_id = mlflow_runs.start_run(
            experiment=record.dataset.name,
            run_name=f"sweep of {sweep.trials} trials",
            params={"trials": sweep.trials, "eta": sweep.eta, "metric": sweep.metric, **space},
            tags={tags.RESULT: "a sweep under way", tags.USER: this_user(), **flow_tags()},
        )
        written = record.model_dump_json(indent=2, exclude_unset=True)
        outlast(partial(mlflow_runs.log_text, run_id, RECORD, written))
        # With this tag the sweep can be resumed, and the doctor closes it if this process is killed.
        outlast(partial(mlflow_runs.set_tags, run_id, {tags.SWEEP: run_id}))
    hint = f"`convoy sweep --resume {run_id}` goes on"
    with hold_run_lock(run_id, str(flow_run.id)), model_lease(f"sweep {run_id}"):  # here, and on other machines
        status: mlflow_runs.RunStatus = "FINISHED"
        finished = mlflow_runs.run_status(run_id) == "FINISHED"
        try:
            if resumed:
                mlflow_runs.set_tags(run_id, flow_tags())
                outlast(partial(mlflow_runs.reopen_run, run_id))
            run_logger().info("the sweep's run is %s", mlflow_runs.run_url(run_id))
            yield run_id
        except BaseException as error:
            stopped = isinstance(error, (*STOPPED, Interrupted))
            status = "KILLED" if stopped else "FINISHED" if finished else "FAILED"
            if not isinstance(error, UsageError):
                run_logger().warning("the sweep has stopped; %s", hint)
            if isinstance(error, Interrupted):
                raise Interrupted(f"interrupted; {hint}") from None
            raise
        finally:
            outlast(partial(mlflow_runs.end_run, run_id, status))


def _publish(result: SweepResult, ranked: Sequence[Trial], metric: str) -> None:
    """Tells MLflow and Prefect what was found."""
    figures = {f"sweep/best_{metric.removeprefix('val/')}": result.score, "sweep/epochs": float(result.epochs)}
    for rung, correlation in enumerate(result.rank_correlation, start=1):
        if correlation is not None:
            figures[f"sweep/rank_correlation_{rung}"] = correlation
    text = f"best: trial {result.best_trial}, {metric} {result.score:.4f}"
    outlast(partial(mlflow_runs.log_metrics, result.run_id, figures))
    outlast(partial(mlflow_runs.set_tags, result.run_id, {tags.RESULT: text}))
    rows = [
        {"trial": trial.number, **trial.values, **{f"rung {rung}": score for rung, score in trial.scores.items()}}
        for trial in ranked
    ]
    outlast(partial(create_table_artifact, rows, key="sweep-trials", description=text))
    run_logger().info("%s: %s", text, ", ".join(f"{key}={value}" for key, value in result.values.items()))


def _trials_of(sweep_run: str) -> Iterator[Trial]:
    """Yields what the trials of a sweep have done so far; those without a record of their inputs begin anew."""
    store = open_bucket()
    for run in mlflow_runs.search_runs(tags.SWEEP, sweep_run):
        if tags.SWEEP_TRIAL not in run.tags or not store.head(bucket_layout.run_record(run.run_id)):
            continue
        prefix = RUNG_METRIC.format("")
        yield Trial(
            number=int(run.tags[tags.SWEEP_TRIAL]),
            values=json.loads(run.tags[tags.SWEEP_VALUES]),
            run_id=run.run_id,
            scores={int(name.removeprefix(prefix)): v for name, v in run.metrics.items() if name.startswith(prefix)},
            failed=tags.SWEEP_FAILED in run.tags,
        )


def _correlation(trials: Sequence[Trial], rung: int) -> float | None:
    both = [(trial.scores[rung], trial.scores[rung + 1]) for trial in trials if rung + 1 in trial.scores]
    found = float(spearmanr(*zip(*both, strict=True)).statistic) if len(both) > 1 else math.nan
    return round(found, 3) if math.isfinite(found) else None


def _distribution(values: Range | tuple[Value, ...]) -> Any:
    from optuna import distributions

    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(values)
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    step = None if values.step is None else float(values.step)
    return distributions.FloatDistribution(float(values.low), float(values.high), values.log, step)


def _shown(values: Range | tuple[Value, ...]) -> str:
    if not isinstance(values, Range):
        return ", ".join(map(str, values))
    return f"{values.low} to {values.high}" + (", logarithmic" if values.log else "")
