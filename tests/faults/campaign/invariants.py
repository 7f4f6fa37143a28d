"""What must hold after each trial. Each function says in words what is wrong; nothing if all is well."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import TERMINAL_STATES
from prefect.exceptions import ObjectNotFound

from infra import promotion
from infra.registry import aliased
from tasks.doctor import find_orphans
from tasks.lease import limit_of
from tests.faults.campaign.trial import Trial
from tests.flows.program import difference, history

NOT_FINAL = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES)))


def _weights(trial: Trial) -> str | None:
    """Finished, with the bits of the undisturbed training."""
    if not (run := trial.finished()):
        return f"never finished: {trial.commands[-2].text.strip().splitlines()[-1:]}"
    ours, theirs = (MlflowClient().get_run(each).data.tags["convoy.weights_sha256"] for each in (run, trial.reference))
    return None if ours == theirs else f"{ours[:12]}, not {theirs[:12]}"


def _metrics(trial: Trial) -> str | None:
    """The history is the undisturbed one's; and no metric, timings included, is twice at a step."""
    if not (run := trial.finished()):
        return None
    wrong, ours, theirs = [], history(run), history(trial.reference)
    for name in sorted(ours.keys() | theirs.keys()):
        if (found := ours.get(name, [])) != (expected := theirs.get(name, [])):
            steps = difference([step for step, _ in found], [step for step, _ in expected])
            wrong.append(f"{name} {steps[:60]}")
    for name in MlflowClient().get_run(run).data.metrics:
        steps_of = Counter(point.step for point in MlflowClient().get_metric_history(run, name))
        wrong += [f"{name} twice"] if max(steps_of.values()) > 1 else []
    return f"{len(wrong)}: {', '.join(wrong[:3])}" if wrong else None


def _versions(trial: Trial) -> str | None:
    runs = [version.run_id for version in trial.versions()]
    return None if runs == [trial.finished()] else f"versions of {runs}"


def _history(trial: Trial) -> str | None:
    found = promotion.history(trial.home.store(), trial.name)
    changes = [(entry.from_version, entry.to_version) for entry in found]
    return None if changes == [(None, "1")] else f"{changes}"


def _aliases(trial: Trial) -> str | None:
    entries = promotion.history(trial.home.store(), trial.name)
    champion, wanted = aliased(trial.name, "champion"), entries[-1].to_version if entries else None
    return None if (champion.version if champion else None) == wanted else f"{champion}, not {wanted}"


def _processes(trial: Trial) -> str | None:
    found = [" ".join(process.cmdline())[-60:] for process in trial.home.others()]
    return f"{len(found)}: {found[0]}" if found else None


def _running(trial: Trial) -> str | None:
    """Nothing is open in MLflow or Prefect, the model's lease included."""
    wrong = [f"MLflow {run.info.status}" for run in trial.runs() if run.info.status in ("RUNNING", "SCHEDULED")]
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=NOT_FINAL)):
            if run.id not in trial.home.known_open:
                trial.home.known_open.add(run.id)
                wrong.append(f"Prefect {run.name} {run.state_name}")
        with suppress(ObjectNotFound):
            taken = client.read_global_concurrency_limit_by_name(limit_of(trial.name)).active_slots
            wrong += ["the lease is taken"] if taken else []
    return ", ".join(wrong) or None


def _left(trial: Trial) -> str | None:
    """No stray object in the bucket, no stray file here."""

    def objects(run: str) -> set[str]:
        keys = [info.key.split("/", 2)[2] for info in trial.home.store().list(f"runs/{run}/")]
        return {key for key in keys if not key.startswith("checkpoints/")}  # whose number is a matter of time

    found = [str(finding) for finding in find_orphans(timedelta(0))]
    if run := trial.finished():
        found += [f"object {key}" for key in objects(run) ^ objects(trial.reference)]
    found += [f"temporary {path.name}" for path in trial.home.tmp.iterdir() if not path.name.startswith("weed.")]
    return f"{len(found)}: {found[0][:100]}" if found else None


def _said(trial: Trial) -> str | None:
    """No traceback, nothing hung, and a signal to the flow decides its exit status."""
    wrong = [f"traceback of {each}" for each in trial.commands if "Traceback (most" in each.text]
    wrong += [str(each) for each in trial.commands if each.hung] + trial.noticed
    status = {"SIGTERM flow": 75, "SIGINT flow": 130}.get(trial.plan.fault)
    if status and not trial.late and trial.commands[0].status != status:
        wrong.append(f"exit status {trial.commands[0].status}, not {status}")
    return "; ".join(wrong) or None


INVARIANTS: dict[str, Callable[[Trial], str | None]] = {
    "weights": _weights,
    "metrics": _metrics,
    "one version": _versions,
    "history": _history,
    "aliases": _aliases,
    "processes": _processes,
    "running": _running,
    "left": _left,
    "said": _said,
}
