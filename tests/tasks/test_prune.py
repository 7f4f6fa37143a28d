"""Retention on the real servers: what is removed, what is always kept, and in which order."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.tracking import MlflowClient
from prefect import get_client
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelled, Pending, Running, Scheduled

import tasks.data.prune_mark
import tasks.upkeep.prune
from cnn.data.manifest import Shard
from cnn.preprocessing.pixel_statistics import PixelSums
from cnn.preprocessing.resume_records import PackedShard
from infra.errors import ServiceError, UsageError
from infra.settings import Settings
from infra.sources.raw_data import RawSource
from infra.storage import bucket_layout
from infra.storage.object_store import ObjectInfo, ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, delete_alias, set_alias
from infra.tracking.promotion_history import Lineage, newest, promote
from infra.tracking.tags import SWEEP
from tasks.config.retention import RetentionConfig, load_retention
from tasks.data.prune_mark import marked, wait_for_prune
from tasks.training.liveness import hold_run_lock
from tasks.upkeep.prune import Pruned, active_trainings
from tests.tasks.leftovers import Leftovers, flow_run_in

NO_DATASET = RetentionConfig(datasets_keep=0)


@pytest.fixture
def made(stack: object, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leftovers]:
    monkeypatch.setenv("CONVOY_BUCKET", "test")
    monkeypatch.setenv("CONVOY_HOME", str(tmp_path / "home"))
    refresh_global_settings_context()  # Prefect was imported before the stack named its server
    monkeypatch.setattr(tasks.upkeep.prune, "active_trainings", set)  # flows of other tests are ignored
    leftovers = Leftovers(store, monkeypatch)
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):  # else logs are on their way when Prefect ends
        yield leftovers
    leftovers.end()


def prune(config: RetentionConfig = NO_DATASET, *, dry_run: bool = False, forget_unknown: bool = False) -> Pruned:
    return tasks.upkeep.prune.prune.fn(config, dry_run=dry_run, forget_unknown=forget_unknown)


def checkpoints(made: Leftovers, run_id: str) -> bool:
    return bool(made.there(bucket_layout.checkpoints(run_id)))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_checkpoints_go_when_nobody_needs_them_any_more(made: Leftovers) -> None:
    finished, just_finished = made.run(days=2), made.run(days=0.5)
    resumable, given_up = made.run("KILLED", days=13), made.run("FAILED", days=15)
    running = made.run("RUNNING")
    result = prune()
    kept = [checkpoints(made, run) for run in (finished, just_finished, resumable, given_up, running)]
    assert kept == [False, True, True, False, True]
    assert [(each.kind, each.count, each.bytes) for each in result.freed] == [("checkpoints", 4, 4)]


@pytest.mark.long
def test_checkpoints_stay_while_a_flow_run_waits_to_go_on_from_them(made: Leftovers) -> None:
    """It waits for a worker, or for the lease of its model; MLflow still says that the run was killed."""
    old, tried, sweep = made.run("KILLED", days=15), made.run("KILLED", days=15), uuid4().hex
    mlflow_runs.set_tags(tried, {SWEEP: sweep})
    waiting = [
        flow_run_in(Scheduled(), "train", resume=old),
        flow_run_in(Scheduled(), "train", sweep={"resume": sweep}),
    ]
    prune()
    assert checkpoints(made, old) and checkpoints(made, tried)
    with get_client(sync_client=True) as client:
        for each in waiting:
            client.set_flow_run_state(each.id, Cancelled(), force=True)
    prune()
    assert not checkpoints(made, old) and not checkpoints(made, tried)


@pytest.mark.long
def test_outputs_of_a_training_go_unless_a_version_came_of_it(made: Leftovers) -> None:
    unregistered, recent, registered = made.run(), made.run(days=80), made.run()
    made.version(registered, "0" * 64)
    prune()
    assert not made.there(f"runs/{unregistered}/")
    assert len(made.outputs(recent)) == len(made.outputs(registered)) == 5


@pytest.mark.long
def test_a_process_at_work_protects_its_run_whatever_mlflow_says(made: Leftovers) -> None:
    run = made.run("KILLED")
    with hold_run_lock(run):
        prune()
        assert checkpoints(made, run) and len(made.outputs(run)) == 5
    prune()
    assert not made.there(f"runs/{run}/")


@pytest.mark.long
@pytest.mark.parametrize("why", ["alias", "champion", "earlier champion", "none"])
def test_versions_in_force_keep_all_that_they_rest_on(made: Leftovers, why: str) -> None:
    dataset = made.dataset("shard")
    run = made.run(dataset=dataset, name="ours")
    source = made.source("ours", "file")
    report = made.put(f"reports/data/{dataset}/0/data.json")
    version = made.version(run, dataset)
    if why == "alias":
        set_alias(version, "staging")
    elif why != "none":
        entry = promote(made.store, version, after=None)
        if why == "earlier champion":
            other = made.run(days=0)
            promote(made.store, made.version(other, "0" * 64, version.name), after=entry)
            delete_alias(version.name, "previous")  # the history alone has to do
        else:
            delete_alias(version.name, "champion")
    prune()
    rests_on = {
        bucket_layout.dataset_manifest(dataset),
        bucket_layout.shard(sha256("shard")),
        bucket_layout.raw_file(sha256("file")),
        source,
        report,
    }
    assert made.there().intersection(rests_on) == (set() if why == "none" else rests_on)
    assert len(made.outputs(run)) == 5


@pytest.mark.parametrize("record", [True, False])
def test_a_running_training_keeps_its_data(made: Leftovers, record: bool) -> None:
    dataset = made.dataset("shard")
    made.put(f"pretrained/{sha256('w')}.safetensors")
    made.source("data", "file")
    made.run("RUNNING", dataset=dataset, record=record, pretrained=sha256("w"))
    prune()
    assert bucket_layout.dataset_manifest(dataset) in made.there() and len(made.there("shards/")) == 1
    if record:
        assert len(made.there("pretrained/")) == len(made.there("raw/")) == 1


@pytest.mark.long
def test_a_training_that_can_be_resumed_keeps_its_data(made: Leftovers) -> None:
    dataset = made.dataset("shard")
    made.put(f"pretrained/{sha256('w')}.safetensors")
    made.run("FAILED", dataset=dataset, days=10, pretrained=sha256("w"))
    prune()
    assert bucket_layout.dataset_manifest(dataset) in made.there() and len(made.there("pretrained/")) == 1
    prune(RetentionConfig(datasets_keep=0, unfinished_checkpoints_days=5))
    assert not made.there("datasets/") and not made.there("shards/") and not made.there("pretrained/")


@pytest.mark.long
def test_the_newest_and_the_recent_dataset_versions_stay(made: Leftovers) -> None:
    ages = (10.0, 20.0, 40.0, 50.0)
    versions = {days: made.dataset(str(days), days=days) for days in ages}
    prune(RetentionConfig(datasets_keep=3))
    assert made.there("datasets/") == {bucket_layout.dataset_manifest(versions[days]) for days in ages[:3]}
    prune(RetentionConfig(datasets_keep=1))
    assert made.there("datasets/") == {bucket_layout.dataset_manifest(versions[days]) for days in ages[:2]}


@pytest.mark.long
def test_an_index_goes_with_its_dataset_version_and_counts_as_none(made: Leftovers) -> None:
    kept = {}
    for days in (40.0, 50.0):
        version = made.dataset(str(days), days=days)
        keys = bucket_layout.index_record(version), bucket_layout.image_index(version, "0" * 64)
        kept[days] = {bucket_layout.dataset_manifest(version), *(made.put(key, days=days) for key in keys)}
    prune(RetentionConfig(datasets_keep=2))
    assert made.there("datasets/") == kept[40] | kept[50]
    prune(RetentionConfig(datasets_keep=1))
    assert made.there("datasets/") == kept[40]
    gone = [key for key in made.deleted if key in kept[50]]
    assert len(gone) == 3 and gone[0].endswith("manifest.json")


def test_shards_and_raw_files_go_only_if_nothing_kept_names_them(made: Leftovers) -> None:
    made.dataset("shared", "only old")
    made.dataset("shared", days=10)
    made.days[f"shards/{sha256('shared')}.safetensors"] = 100
    for place in ("raw", "shards"):
        made.put(f"{place}/nobody's")
        made.put(f"{place}/just stored", days=0.9)
    made.run(days=0, dataset="1" * 64, name="other")
    made.source("old", "shared file", "only old file")
    made.source("new", "shared file", days=10)
    prune(RetentionConfig(datasets_keep=1, raw_days=9.5))
    assert made.there("shards/") == {f"shards/{sha256('shared')}.safetensors", "shards/just stored"}
    assert made.there("raw/") == {"raw/just stored"}


def test_an_interrupted_preprocessing_keeps_its_shards_until_it_is_old(made: Leftovers) -> None:
    for step, days in (("old", 8.0), ("fresh", 6.0)):
        shard = Shard(sha256=sha256(step), count=1, bytes=1)
        sums = PixelSums(sums=(0,), squares=(0,))
        packed = PackedShard(split="train", number=0, shard=shard, stop=1, sums=sums, unreadable=(), examples=())
        made.put(bucket_layout.shard(shard.sha256))
        made.put(f"journals/{step}/survey/{0:012}.npz")
        made.put(f"journals/{step}/shards/train/{0:08}.json", packed.model_dump_json().encode(), days)
    prune()
    assert made.there("shards/") == {f"shards/{sha256('fresh')}.safetensors"}
    assert len(made.there("journals/fresh/")) == 2 and not made.there("journals/old/")


def test_listings_go_like_raw_files(made: Leftovers) -> None:
    made.put("listings/old.parquet")
    fresh = made.put("listings/fresh.parquet", days=20)
    prune()
    assert made.there("listings/") == {fresh}


def test_raw_files_of_a_source_that_stays_stay(made: Leftovers) -> None:
    made.source("old", "shared file", "only old file")
    source = made.source("new", "shared file", days=10)
    made.days[f"raw/{sha256('shared file')}"] = 100
    prune()
    assert made.there("raw/") == {f"raw/{sha256('shared file')}"} and made.there("sources/") == {source}


@pytest.mark.long
def test_raw_data_stay_while_a_new_dataset_may_be_of_them(made: Leftovers) -> None:
    dataset = made.dataset("shard", days=10)
    made.source("data", "file")
    prune()
    assert len(made.there("raw/")) == 1
    made.run(days=0, dataset=dataset, name="other")  # now it is known
    prune()
    assert not made.there("raw/") and not made.there("sources/")


@pytest.mark.long
def test_raw_data_that_a_dataset_says_it_was_made_of_stay_whatever_their_name(made: Leftovers) -> None:
    kept = made.source("data", "file")
    made.source("data", "an earlier state of the file")
    raw = RawSource.model_validate_json(made.store.get_bytes(kept)).digest
    dataset = made.dataset("shard", days=10, raw=raw)
    for _ in range(2):  # no run has used it yet; then one has, under another name
        prune()
        assert made.there("sources/") == {kept} and made.there("raw/") == {f"raw/{sha256('file')}"}
        made.run(days=0, dataset=dataset, name="other")


def test_step_records_go_with_their_dataset_or_when_very_old(made: Leftovers) -> None:
    made.dataset("old")
    kept = made.dataset("kept", days=10)
    steps = {f"steps/preprocess/{kept[::-1]}.json"}
    made.put("steps/preprocess/ancient.json", b'{"dataset_version": "%s"}' % kept.encode(), days=400)
    prune()
    assert made.there("steps/") == steps


def test_data_reports_go_at_their_age(made: Leftovers) -> None:
    made.put("reports/data/1/0/data.json", days=91)
    recent = made.put("reports/data/2/0/data.json", days=89)
    prune()
    assert made.there("reports/") == {recent}


def test_verdicts_and_promotions_never_go(made: Leftovers) -> None:
    run = made.run(days=0)
    version = made.version(run, "0" * 64)
    promote(made.store, version, after=None)
    verdict = made.put(f"models/{version.name}/verdicts/1.json", days=10_000)
    made.days |= dict.fromkeys(made.there("models/"), 10_000)
    prune(RetentionConfig(grace_days=0, runs_days=0, datasets_keep=0, datasets_days=0, raw_days=0, reports_days=0))
    assert verdict in made.there() and newest(made.store, version.name)


def test_commits_go_before_what_they_commit(made: Leftovers) -> None:
    dataset = made.dataset("shard")
    run = made.run(dataset=dataset)
    made.source("x", "file")
    made.put("reports/data/1/0/data_samples.png")
    made.put("reports/data/1/0/data.json")
    prune()
    order = made.deleted.index
    assert not made.there()
    step = f"runs/{run}/checkpoints/step-00000007"
    assert order(f"{step}/commit.json") < order(f"{step}/state.safetensors")
    assert order(f"runs/{run}/weights/commit.json") < order(f"runs/{run}/weights/model.safetensors")
    assert order(bucket_layout.dataset_manifest(dataset)) < order(f"shards/{sha256('shard')}.safetensors")
    assert order(f"steps/preprocess/{dataset[::-1]}.json") < order(bucket_layout.dataset_manifest(dataset))
    (source,) = [key for key in made.deleted if key.startswith("sources/")]
    assert order(source) < order(f"raw/{sha256('file')}")
    assert order("reports/data/1/0/data.json") < order("reports/data/1/0/data_samples.png")


@pytest.mark.long
def test_a_dry_run_tells_the_same_and_a_second_run_finds_nothing(made: Leftovers) -> None:
    from flows.prune import prune_flow

    made.run(dataset=made.dataset("one"), name="a")
    made.run("FAILED", dataset=made.dataset("two"), name="b", days=20)
    made.source("a", "file")
    made.source("b", "file of b")
    before = made.there()
    told = prune_flow(NO_DATASET, dry_run=True)
    assert made.there() == before and not made.deleted and told.freed
    assert prune_flow(NO_DATASET, dry_run=False).freed == told.freed
    assert sum(each.count for each in told.freed) == len(before) - len(made.there())
    assert prune().freed == ()


def test_data_are_left_alone_while_a_training_prepares_its_own(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    before = active_trainings()
    begun = {str(flow_run_in(state, "train").id) for state in (Running(), Pending())}
    assert active_trainings() == before | begun
    monkeypatch.setattr("tasks.upkeep.prune.MAX_PREPARATION", timedelta(seconds=-1))  # as if all had begun long ago
    assert active_trainings() == set()


@pytest.mark.long
def test_what_is_no_data_goes_all_the_same(made: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    made.run(dataset=made.dataset("shard"))
    made.source("data", "file")
    monkeypatch.setattr(tasks.upkeep.prune, "active_trainings", lambda: {"a flow run without an MLflow run"})
    result = prune()
    assert not made.there("runs/") and len(made.there()) == 5 and "preparing" in result.notes[0]


def test_nothing_goes_if_it_is_not_known_what_a_version_rests_on(made: Leftovers) -> None:
    run = made.run()
    set_alias(made.version(run, "0" * 64), "staging")
    made.put(f"runs/{run}/run.json", b"{}")
    before = made.there()
    with pytest.raises(ServiceError, match=r"run\.json is damaged"):
        prune()
    assert made.there() == before


def champion_unknown_to_mlflow(made: Leftovers, *, written_down: bool) -> tuple[str, set[str]]:
    """Makes a champion that only the history knows; returns its run and the keys of all objects that it needs."""
    dataset, run = made.dataset("shard"), uuid4().hex
    made.source("ours", "file")
    made.put(f"pretrained/{sha256('w')}.safetensors")
    for file in ("weights/model.safetensors", "weights/commit.json", "reference.safetensors"):
        made.put(f"runs/{run}/{file}")
    lineage = Lineage(run_id=run, dataset_version=dataset, dataset_name="ours", pretrained_sha256=sha256("w"))
    version = ModelVersion(name=f"unknown {run}", version="1")
    promote(made.store, version, after=None, lineage=lineage if written_down else None)
    return run, made.there()


@pytest.mark.long
def test_a_champion_that_mlflow_does_not_know_is_protected_by_its_history(made: Leftovers) -> None:
    run, rests_on = champion_unknown_to_mlflow(made, written_down=True)
    with pytest.raises(ServiceError, match=rf"promoted versions unknown {run}/1 and runs {run}, of which the bucket"):
        prune()
    assert made.there() == rests_on
    prune(forget_unknown=True)
    assert made.there() == rests_on


def test_a_champion_whose_version_was_deleted_is_kept_and_holds_up_no_prune(made: Leftovers) -> None:
    dataset = made.dataset("shard")
    run = made.run(dataset=dataset)
    version = made.version(run, dataset)
    promote(made.store, version, after=None, lineage=Lineage(run_id=run, dataset_version=dataset))
    delete_alias(version.name, "champion")
    MlflowClient().delete_model_version(version.name, version.version)
    prune()
    assert bucket_layout.dataset_manifest(dataset) in made.there() and len(made.outputs(run)) == 5


def test_the_history_protects_beside_an_empty_registry_only_what_it_names(made: Leftovers) -> None:
    champion_unknown_to_mlflow(made, written_down=False)  # by an older Convoy
    before = made.there()
    with pytest.raises(ServiceError, match="--forget-unknown"):
        prune()
    assert made.there() == before
    prune(forget_unknown=True)
    assert {key.split("/")[0] for key in made.there()} == {"models"}


def test_entries_of_an_older_convoy_are_completed_from_the_registry(made: Leftovers) -> None:
    dataset = made.dataset("shard")
    run = made.run(dataset=dataset)
    version = made.version(run, dataset)
    promote(made.store, version, after=None)
    delete_alias(version.name, "champion")
    prune()
    assert bucket_layout.dataset_manifest(dataset) in made.there() and len(made.outputs(run)) == 5


@pytest.mark.long
def test_runs_that_mlflow_does_not_know_are_named_and_those_deleted_there_are_not(made: Leftovers) -> None:
    deleted, unknown = made.run(), [f"{number:032}" for number in range(9)]
    MlflowClient().delete_run(deleted)
    made.runs.remove(deleted)
    prune()
    assert not made.there(f"runs/{deleted}/")
    for run in unknown:
        made.put(f"runs/{run}/run.json")
    before = made.there()
    with pytest.raises(ServiceError, match=f"does not know runs {', '.join(unknown[:5])}, of which"):
        prune()
    assert made.there() == before
    prune(forget_unknown=True)
    assert not made.there("runs/")


@pytest.mark.long
def test_a_training_that_begins_while_data_are_deleted_waits_and_stores_them_again(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.dataset("shard")
    shard = bucket_layout.shard(sha256("shard"))
    deleting, go_on = threading.Event(), threading.Event()
    really_delete = ObjectStore.delete

    def delete(store: ObjectStore, key: str) -> None:
        if key == shard:
            deleting.set()
            assert go_on.wait(60)
        really_delete(store, key)

    monkeypatch.setattr(ObjectStore, "delete", delete)
    with ThreadPoolExecutor(2) as pool:
        pruning = pool.submit(prune)
        assert deleting.wait(60)  # the plan is made, and the shard is still there
        training = pool.submit(lambda: (wait_for_prune(made.store), made.store.head(shard))[1])
        assert made.there(bucket_layout.PRUNING) and not training.done()
        go_on.set()
        pruning.result(60)
        assert training.result(60) is None  # so that it stores the shard, rather than rely on it
    assert not made.there()


@pytest.mark.long
def test_a_prune_that_was_killed_holds_up_a_training_only_for_a_while(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.data.prune_mark, "MAX_SILENCE_SECONDS", 0.0)
    made.put(f"{bucket_layout.PRUNING}left behind")
    wait_for_prune(made.store)
    assert not made.there(bucket_layout.PRUNING)


def test_a_prune_whose_mark_was_taken_for_a_dead_ones_stops(made: Leftovers) -> None:
    with marked(made.store) as check:
        check()
        (mark,) = made.there(bucket_layout.PRUNING)
        made.store.delete(mark)
        with pytest.raises(ServiceError, match="start it again"):
            check()


def test_files_of_this_machine_go_by_age(made: Leftovers) -> None:
    cache, runs = Settings().cache / "ab", Settings().runs
    unfinished = [Settings().cache / ".copy.part", Settings().cache / "partial" / "download"]
    live, ended = made.run("RUNNING", days=0), made.run(days=0)
    for folder in (cache, runs / live, runs / ended):
        folder.mkdir(parents=True)
        for name in ("old", "new"):
            (folder / name).write_bytes(b"xx")
    (runs / ended / "new").unlink()
    for file in unfinished:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"xx")
    then = time.time() - 31 * 86_400
    for path in (*unfinished, cache / "old", runs / live / "old", runs / ended / "old", runs / ended):
        os.utime(path, (then, then))
    result = prune()
    assert [(each.kind, each.count, each.bytes) for each in result.freed] == [
        ("cached files", 3, 6),
        ("folders of trainings", 1, 2),
    ]
    assert (cache / "new").exists() and not any(file.exists() for file in (cache / "old", *unfinished))
    assert (runs / live).exists() and not (runs / ended).exists()


def test_files_that_another_process_removes_at_the_same_time_are_passed_over(
    made: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = Settings().cache / "ab", Settings().runs / made.run(days=0)
    really = Path.stat
    vanishing = set()
    then = time.time() - 31 * 86_400
    for folder in (cache, run):
        folder.mkdir(parents=True)
        for name in ("first", "second"):
            (folder / name).write_bytes(b"xx")
            os.utime(folder / name, (then, then))
            vanishing.add(folder / name)
    os.utime(run, (then, then))

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        status = really(path, follow_symlinks=follow_symlinks)
        if path in vanishing:  # it is there at the first look only
            path.unlink(missing_ok=True)
        return status

    monkeypatch.setattr(Path, "stat", stat)
    assert [(each.kind, each.bytes) for each in prune().freed] == [("cached files", 0), ("folders of trainings", 0)]
    assert not run.exists()


def test_artifacts_of_mlflow_are_not_even_listed(made: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    made.put("mlflow/1/artifact")
    asked, listing = [], ObjectStore.list

    def noted(store: ObjectStore, prefix: str) -> Iterator[ObjectInfo]:
        asked.append(prefix)
        return listing(store, prefix)

    monkeypatch.setattr(ObjectStore, "list", noted)
    prune()
    assert asked and not any("mlflow/1/artifact".startswith(prefix) for prefix in asked)


def test_a_wrong_key_is_named() -> None:
    assert load_retention(["datasets_keep=3"]).datasets_keep == 3
    with pytest.raises(UsageError, match=r"datasets_kept.*the keys: grace_days"):
        load_retention(["datasets_kept=3"])
    with pytest.raises(UsageError, match="raw_days"):
        load_retention(["raw_days=-1"])
