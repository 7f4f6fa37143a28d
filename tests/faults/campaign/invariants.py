"""Says in words what is wrong after a trial; each function returns nothing if all is well."""

from collections import Counter
from contextlib import suppress
from datetime import timedelta

from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import TERMINAL_STATES
from prefect.exceptions import ObjectNotFound

from infra.tracking import promotion_history
from infra.tracking.model_registry import aliased
from tasks.orchestration.model_lease import limit_of
from tasks.upkeep.doctor import find_orphans
from tests.faults.campaign.trial import Trial
from tests.flows import program

NOT_FINAL = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES)))
CACHES = ("weed.", "torchinductor_")  # folders that SeaweedFS and PyTorch keep among temporary files, one per user
EXIT_STATUS = {"SIGTERM flow": 75, "SIGINT flow": 130}


def weights(trial: Trial) -> list[str]:
    """Finished, with the bits of the undisturbed training."""
    if not (run := trial.finished()):
        return [f"never finished: {trial.commands[-2].log.read_text().strip().splitlines()[-1:]}"]
    client, runs = MlflowClient(), (run, trial.home.reference)
    ours, theirs = (client.get_run(each).data.tags["convoy.weights_sha256"] for each in runs)
    return [] if ours == theirs else [f"{ours[:12]}, not {theirs[:12]}"]


def metrics(trial: Trial) -> list[str]:
    """The history is the undisturbed one's; and no metric, timings included, is twice at a step."""
    if not (run := trial.finished()):
        return []
    ours, theirs = program.history(run), program.history(trial.home.reference)
    wrong = [
        f"{name} {program.difference([step for step, _ in found], [step for step, _ in expected])[:60]}"
        for name in sorted(ours.keys() | theirs.keys())
        if (found := ours.get(name, [])) != (expected := theirs.get(name, []))
    ]
    client = MlflowClient()
    for name in client.get_run(run).data.metrics:
        steps = Counter(point.step for point in client.get_metric_history(run, name))
        wrong += [f"{name} twice"] if max(steps.values()) > 1 else []
    return wrong


def versions(trial: Trial) -> list[str]:
    """The finished run has one version, and no other run has any."""
    runs = [version.run_id for version in trial.versions()]
    return [] if runs == [trial.finished()] else [f"versions of {runs}"]


def champion(trial: Trial) -> list[str]:
    """The history is one promotion, and the alias is where it says."""
    changes = [
        (entry.from_version, entry.to_version) for entry in promotion_history.history(trial.home.store(), trial.name)
    ]
    found = aliased(trial.name, "champion")
    return [] if changes == [(None, "1")] and found and found.version == "1" else [f"{changes}, alias {found}"]


def processes(trial: Trial) -> list[str]:
    """No process of the state folder lives, but for the servers'."""
    return [" ".join(process.cmdline())[-60:] for process in trial.home.others()]


def open_runs(trial: Trial) -> list[str]:
    """Nothing is open in MLflow or Prefect, the model's lease included."""
    wrong = [f"MLflow {run.info.status}" for run in trial.runs() if run.info.status in ("RUNNING", "SCHEDULED")]
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=NOT_FINAL)):
            wrong += [f"Prefect {run.name} {run.state_name}"] if run.created and run.created > trial.began else []
        with suppress(ObjectNotFound):
            taken = client.read_global_concurrency_limit_by_name(limit_of(trial.name)).active_slots
            wrong += ["the lease is taken"] if taken else []
    return wrong


def leftovers(trial: Trial) -> list[str]:
    """No stray object is in the bucket, and no stray file here; what a killed process had in use, is not its fault."""

    def objects(run: str) -> set[str]:
        keys = [info.key.split("/", 2)[2] for info in trial.home.store().list(f"runs/{run}/")]
        return {key for key in keys if not key.startswith("checkpoints/")}  # whose number is a matter of time

    found = [str(finding) for finding in find_orphans(timedelta(0))]
    if run := trial.finished():
        found += [f"object {key}" for key in objects(run) ^ objects(trial.home.reference)]
    for path in trial.home.tmp.iterdir():
        if not trial.killed and not path.name.startswith(CACHES):
            found.append(f"temporary {path.name} {[each.name for each in path.rglob('*')][:3]}")
    return found


def messages(trial: Trial) -> list[str]:
    """No command printed a traceback or hung, and a signal to the flow decides its exit status."""
    wrong = [f"traceback of {each}" for each in trial.commands if "Traceback (most" in each.log.read_text()]
    wrong += [str(each) for each in trial.commands if each.hung] + trial.noticed
    status = EXIT_STATUS.get(trial.plan.fault)
    if status and not trial.late and trial.commands[0].returncode != status:
        wrong.append(f"exit status {trial.commands[0].returncode}, not {status}")
    return wrong
