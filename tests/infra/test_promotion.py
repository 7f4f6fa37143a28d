"""Promotions on a real object store and a real MLflow: one winner, a history that stays, aliases that follow it."""

import json
import multiprocessing
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from infra.errors import Outage, ServiceError, UsageError
from infra.machine import stopping
from infra.machine.stopping import Stopped
from infra.storage.object_store import ObjectStore
from infra.tracking import mlflow_runs
from infra.tracking.model_registry import ModelVersion, aliased, create_version, delete_alias, set_alias, tag_version
from infra.tracking.promotion_history import (
    AlreadyChampion,
    Lineage,
    Promotion,
    PromotionLost,
    champions,
    find_model,
    history,
    lineage_of,
    misplaced_aliases,
    names_with_history,
    newest,
    promote,
    repair_aliases,
    rollback,
    standing_champion,
)
from tasks.release.model_list import age, list_models
from tasks.release.promote import champion_data, promotions_of

RACERS = 6
NAMES = (f"promotion {number}" for number in count())


@pytest.fixture(scope="module")
def model_id(stack: object) -> tuple[str, str]:
    """Creates a run with a model without files, since promotions do not read them."""
    run_id = mlflow_runs.start_run("promotion-tests", "run", {}, {})
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    return run_id, str(MlflowClient().create_logged_model(experiment, name="empty", source_run_id=run_id).model_id)


@pytest.fixture
def versions(store: ObjectStore, model_id: tuple[str, str]) -> list[ModelVersion]:
    """Creates versions 1, 2 and 3 of a new model."""
    name = next(NAMES)
    return [create_version(name, model_id[1], run_id=model_id[0], tags={}) for _ in range(3)]


@pytest.fixture
def aliases(versions: list[ModelVersion]) -> Iterator[Any]:
    def read() -> tuple[str | None, str | None]:
        found = [aliased(versions[0].name, alias) for alias in ("champion", "previous")]
        champion, previous = (each.version if each else None for each in found)
        return champion, previous

    yield read


def promote_all(store: ObjectStore, versions: list[ModelVersion]) -> None:
    for version in versions:
        promote(store, version, after=newest(store, version.name))


def test_promotions_are_written_down_and_aliases_follow(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    first, second, _ = versions
    assert (newest(store, first.name), history(store, first.name)) == (None, [])
    began = promote(store, first, after=None, who="ann@host", reason="it is the first")
    assert aliases() == ("1", None)
    went_on = promote(store, second, after=began, forced=True, verdict_sha256="ab", verdict_summary="refused")
    assert aliases() == ("2", "1")
    assert history(store, first.name) == [began, went_on]
    assert (began.number, began.from_version, began.to_version, began.who) == (1, None, "1", "ann@host")
    assert (went_on.number, went_on.from_version, went_on.to_version, went_on.forced) == (2, "1", "2", True)
    assert (went_on.verdict_sha256, went_on.verdict_summary) == ("ab", "refused")
    keys = [info.key for info in store.list(f"models/{first.name}/")]
    assert keys == [f"models/{first.name}/history/{number:08}.json" for number in (1, 2)]


def test_promoting_the_champion_changes_nothing(store: ObjectStore, versions: list[ModelVersion]) -> None:
    last = promote(store, versions[0], after=None)
    with pytest.raises(AlreadyChampion, match=r"version 1 of .* is its champion already: promoted"):
        promote(store, versions[0], after=last)
    assert history(store, versions[0].name) == [last]


def test_of_racing_threads_one_wins_and_the_others_name_it(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    start = threading.Barrier(RACERS)

    def race(number: int) -> Promotion | PromotionLost:
        start.wait()
        try:
            return promote(store, versions[number % 3], after=None, who=f"racer {number}")
        except PromotionLost as lost:
            return lost

    with ThreadPoolExecutor(RACERS) as pool:
        results = list(pool.map(race, range(RACERS)))
    (winner,) = [result for result in results if isinstance(result, Promotion)]
    losses = [str(result) for result in results if isinstance(result, PromotionLost)]
    assert len(losses) == RACERS - 1
    assert all(f"to version {winner.to_version} by {winner.who}" in loss for loss in losses)
    assert history(store, winner.name) == [winner]
    assert aliases() == (winner.to_version, None)


def race_as_process(version: ModelVersion, after: Promotion | None) -> str:
    try:
        return promote(ObjectStore.connect("test"), version, after=after).id
    except PromotionLost as lost:
        return str(lost)


@pytest.mark.long
def test_of_racing_processes_one_wins(store: ObjectStore, versions: list[ModelVersion], aliases: Any) -> None:
    last = promote(store, versions[0], after=None)
    # Each promotes the same version, with the same reason: only the entries' ids tell them apart.
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(race_as_process, [versions[1]] * 3, [last] * 3))
    entries = history(store, versions[0].name)
    assert [entry.to_version for entry in entries] == ["1", "2"]
    assert results.count(entries[1].id) == 1
    assert sum("was changed by another process meanwhile" in result for result in results) == 2
    assert aliases() == ("2", "1")


@pytest.mark.long
def test_rollbacks_go_back_one_by_one(store: ObjectStore, versions: list[ModelVersion], aliases: Any) -> None:
    name = versions[0].name
    promote_all(store, versions)
    back = rollback(store, name, who="bob@host", reason="it was slow")
    assert (back.action, back.from_version, back.to_version, back.reason) == ("rollback", "3", "2", "it was slow")
    assert aliases() == ("2", "1")
    assert rollback(store, name).to_version == "1"
    assert aliases() == ("1", None)
    with pytest.raises(UsageError, match="version 1 is the first champion"):
        rollback(store, name)
    assert len(history(store, name)) == 5
    promote(store, versions[2], after=newest(store, name))
    assert aliases() == ("3", "1")


@pytest.mark.long
@pytest.mark.parametrize(
    ("deleted", "repaired", "pair"),
    [("2", ["previous: none → 1"], ("3", "1")), ("3", ["champion: none → 2", "previous: 2 → 1"], ("2", "1"))],
    ids=["the one before", "the champion, whose place that one takes"],
)
def test_rollback_skips_versions_that_were_deleted(
    deleted: str,
    repaired: list[str],
    pair: tuple[str, str],
    store: ObjectStore,
    versions: list[ModelVersion],
    aliases: Any,
) -> None:
    name = versions[0].name
    promote_all(store, versions)
    MlflowClient().delete_model_version(name, deleted)
    assert repair_aliases(store, name) == repaired
    assert aliases() == pair
    back = rollback(store, name)
    assert (back.from_version, back.to_version) == ("3", "1")
    assert aliases() == ("1", None)
    with pytest.raises(UsageError, match="version 1 is the first champion"):
        rollback(store, name)


def test_rollback_without_a_champion_says_so(store: ObjectStore, versions: list[ModelVersion]) -> None:
    with pytest.raises(UsageError, match="has no champion"):
        rollback(store, versions[0].name)


def test_champions_after_promoting_one_again(store: ObjectStore, versions: list[ModelVersion], aliases: Any) -> None:
    first, second, _ = versions
    promote_all(store, [first, second, first])
    assert [entry.to_version for entry in champions(history(store, first.name))] == ["1", "2", "1"]
    assert aliases() == ("1", "2")
    assert rollback(store, first.name).to_version == "2"
    assert [entry.to_version for entry in champions(history(store, first.name))] == ["1", "2"]


def test_aliases_are_repaired_from_the_history(store: ObjectStore, versions: list[ModelVersion], aliases: Any) -> None:
    name = versions[0].name
    promote_all(store, versions[:2])
    set_alias(versions[2], "champion")
    MlflowClient().delete_registered_model_alias(name, "previous")
    assert sorted(repair_aliases(store, name)) == ["champion: 3 → 2", "previous: none → 1"]
    assert aliases() == ("2", "1")
    assert repair_aliases(store, name) == []


def test_model_without_history_keeps_its_aliases(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    set_alias(versions[2], "champion")
    assert repair_aliases(store, versions[0].name) == []
    assert aliases() == ("3", None)


def test_promotion_stands_when_the_aliases_cannot_follow(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away, socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            away.setenv(name, f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(Outage, match="its aliases do not show it yet"):  # which a task retries
            promote(store, versions[0], after=None)
    assert aliases() == (None, None)
    with pytest.raises(AlreadyChampion):
        promote(store, versions[0], after=newest(store, versions[0].name))
    assert aliases() == ("1", None)


def test_a_signal_after_a_promotion_is_written_does_not_hide_it(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = store.put_if_absent

    def put_and_signal(key: str, data: bytes) -> bool:
        written.append(key)
        return put(key, data)

    def check() -> None:
        if written:
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(store, "put_if_absent", put_and_signal)
    monkeypatch.setattr(stopping, "check", check)
    assert promote(store, versions[0], after=None).to_version == "1"
    assert aliases() == ("1", None)


def test_promoting_the_champion_and_rolling_back_repair_the_aliases_first(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    name = versions[0].name
    promote_all(store, versions[:1])
    set_alias(versions[2], "champion")
    with pytest.raises(AlreadyChampion):
        promote(store, versions[0], after=newest(store, name))
    assert aliases() == ("1", None)
    delete_alias(name, "champion")
    with pytest.raises(UsageError, match="first champion"):
        rollback(store, name)
    assert aliases() == ("1", None)


def test_misplaced_aliases_are_told_apart_from_those_in_place(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    promote_all(store, versions[:2])
    assert names_with_history(store) == [versions[0].name]
    assert misplaced_aliases(store, versions[0].name) == []
    set_alias(versions[2], "champion")
    assert misplaced_aliases(store, versions[0].name) == ["champion: 3 → 2"]
    assert aliases() == ("3", "1")


@pytest.mark.long
def test_a_champion_that_was_deleted_is_replaced_by_the_last_one_that_is_there(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    name = versions[0].name
    promote_all(store, versions)
    standing = standing_champion(store, name)
    assert (standing.last, standing.version and standing.version.version) == (newest(store, name), "3")
    assert standing.note == ""
    for gone, left in (("3", "2"), ("2", "1")):
        MlflowClient().delete_model_version(name, gone)
        standing = standing_champion(store, name)
        assert standing.last == newest(store, name)  # the `after` of the next promotion
        assert standing.version and standing.version.version == left
        assert f"version {left}, the champion before, takes its place" in standing.note
        repair_aliases(store, name)
        assert aliases() == (left, "1" if left == "2" else None)
    MlflowClient().delete_model_version(name, "1")
    standing = standing_champion(store, name)
    assert standing.version is None and "so the model has none" in standing.note
    assert repair_aliases(store, name) == []


@pytest.mark.long
def test_another_version_of_the_same_number_is_no_champion(
    store: ObjectStore, model_id: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow counts from 1 again when a model has been deleted, while its history stays in the bucket."""
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    name, client = next(NAMES), MlflowClient()
    run_ids = [mlflow_runs.start_run("promotion-tests", "run", {}, {}) for _ in range(3)]

    def register(run_id: str) -> ModelVersion:
        return create_version(name, model_id[1], run_id=run_id, tags={"convoy.dataset_version": f"data of {run_id}"})

    for run_id in run_ids[:2]:
        promote(store, register(run_id), after=newest(store, name), lineage=Lineage(run_id=run_id))
    client.delete_registered_model(name)
    stranger = register(run_ids[2])
    assert stranger.version == "1"
    assert standing_champion(store, name).version is None
    assert "so the model has none" in standing_champion(store, name).note
    assert repair_aliases(store, name) == [] and aliased(name, "champion") is None
    assert champion_data(name) == (None, None)
    assert promotions_of(stranger) == []
    assert [model.champion for model in list_models(store) if model.name == name] == [None]
    with pytest.raises(UsageError, match=f"model '{name}' has no alias 'champion'"):
        find_model(store, name)

    promotion = promote(store, stranger, after=newest(store, name), lineage=Lineage(run_id=run_ids[2]))
    assert (promotion.from_version, promotion.to_version) == ("2", "1")
    standing = standing_champion(store, name).version
    assert standing and (standing.version, standing.run_id) == ("1", run_ids[2])
    assert promotions_of(stranger) == [promotion]
    assert champion_data(name) == (f"data of {run_ids[2]}",) * 2
    with pytest.raises(UsageError, match="so there is none to go back to"):
        rollback(store, name)
    second = register(run_ids[0])
    promote(store, second, after=promotion, lineage=Lineage(run_id=run_ids[0]))
    assert rollback(store, name).run_id == run_ids[2]


def test_the_history_and_not_the_alias_says_what_a_bare_name_means(
    store: ObjectStore, versions: list[ModelVersion], aliases: Any
) -> None:
    name = versions[0].name
    set_alias(versions[2], "champion")
    assert find_model(store, name).version == "3"  # there is no history
    promote_all(store, versions[:2])
    set_alias(versions[2], "champion")
    for reference, expected in (
        (name, "2"),
        (f"{name}@champion", "2"),
        (f"models:/{name}@champion", "2"),
        (f"{name}@previous", "1"),
        (f"{name}/3", "3"),
    ):
        assert find_model(store, reference).version == expected
    for wrong in ("", "@champion", f"{name}@wrong", f"{name}/9"):
        with pytest.raises(UsageError):
            find_model(store, wrong)


def test_an_entry_says_what_its_version_was_made_of(
    store: ObjectStore, versions: list[ModelVersion], model_id: tuple[str, str]
) -> None:
    run_id = model_id[0]
    name, lineage = versions[0].name, Lineage(run_id=run_id, weights_key=f"runs/{run_id}/w", dataset_version="d")
    promote(store, versions[0], after=None, lineage=lineage)
    promote(store, versions[1], after=newest(store, name))
    back = rollback(store, name)
    entries = history(store, name)
    assert (back.run_id, back.weights_key, back.dataset_version) == (run_id, f"runs/{run_id}/w", "d")
    assert lineage_of(entries, "1") == lineage
    assert lineage_of(entries, "2") == Lineage()


@pytest.mark.long
def test_the_oldest_champion_whose_data_count_is_the_last_that_a_rollback_can_reach(
    store: ObjectStore, model_id: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVOY_BUCKET", store.bucket)
    name = next(NAMES)
    assert champion_data(name) == (None, None)
    made = [
        create_version(name, model_id[1], run_id=model_id[0], tags={"convoy.dataset_version": f"d{number}"})
        for number in (1, 2, 3)
    ]
    promote_all(store, made)
    assert champion_data(name) == ("d3", "d1")
    MlflowClient().delete_model_version(name, "1")
    assert champion_data(name) == ("d3", "d2")
    MlflowClient().delete_model_version(name, "3")
    assert champion_data(name) == ("d2", "d2")


def test_entries_of_older_and_newer_convoys_are_read(store: ObjectStore, versions: list[ModelVersion]) -> None:
    entry = promote(store, versions[0], after=None)
    key = f"models/{entry.name}/history/00000001.json"
    older = entry.model_dump(mode="json", exclude=set(Lineage.model_fields))
    for written in (older, older | {"of_tomorrow": 1}):
        store.put_bytes(key, json.dumps(written).encode())
        assert history(store, entry.name) == [entry]


def test_damaged_entry_is_named(store: ObjectStore, versions: list[ModelVersion]) -> None:
    name = versions[0].name
    store.put_bytes(f"models/{name}/history/00000001.json", b"{}")
    with pytest.raises(ServiceError, match=r"history/00000001\.json is damaged"):
        history(store, name)


def test_models_with_a_common_beginning_have_their_own_histories(store: ObjectStore, model_id: tuple[str, str]) -> None:
    name = next(NAMES)
    both = [create_version(each, model_id[1], run_id=model_id[0], tags={}) for each in (name, f"{name} b")]
    promote_all(store, both)
    assert [len(history(store, each.name)) for each in both] == [1, 1]


@pytest.mark.parametrize("name", ["a/b", ""])
def test_what_cannot_name_a_model_has_no_history(store: ObjectStore, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        history(store, name)


def test_models_are_listed_with_the_champion_that_their_history_says(
    store: ObjectStore, versions: list[ModelVersion], model_id: tuple[str, str]
) -> None:
    name, accuracy = versions[0].name, {"convoy.test_accuracy": "0.98765"}
    tag_version(versions[1], accuracy)
    foreign = create_version(next(NAMES), model_id[1], run_id=model_id[0], tags={})
    MlflowClient().rename_registered_model(foreign.name, f"{foreign.name}@home")

    def cells() -> dict[str, list[str]]:
        now = datetime.now(UTC) + timedelta(days=3, minutes=1)
        return {model.name: model.cells(now)[1:] for model in list_models(store)}

    assert cells()[name] == ["none", "", "", "3"]
    promote_all(store, versions[:2])
    set_alias(versions[2], "champion")  # an alias does not decide
    assert cells()[name] == ["2", "98.77%", "3 d", "3"]
    assert aliased(name, "champion") == versions[2]
    promote_all(store, versions[2:])
    MlflowClient().delete_model_version(name, "3")
    assert cells()[name] == ["2", "98.77%", "3 d", "2"]
    assert cells()[f"{foreign.name}@home"] == ["none", "", "", "1"]
    (listed,) = (model for model in list_models(store) if model.name == name)
    assert "version 3" in listed.note and "version 2, the champion before" in listed.note


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (timedelta(seconds=59), "0 min"),
        (timedelta(minutes=59, seconds=59), "59 min"),
        (timedelta(hours=23, minutes=59), "23 h"),
        (timedelta(days=400), "400 d"),
    ],
)
def test_an_age_is_in_the_largest_unit_that_it_fills(span: timedelta, text: str) -> None:
    assert age(span) == text
