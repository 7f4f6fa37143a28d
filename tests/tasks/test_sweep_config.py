"""What a sweep tries, where it compares, and which spaces are refused."""

from pathlib import Path
from typing import Any

import pytest

from infra.errors import UsageError
from tasks.config.run import RunConfig, load_config
from tasks.config.sweep import Range, Rung, SweepConfig, contains, read_sweep, trial_config, value_of
from tasks.data.dataset import DatasetRef
from tasks.training.sweep import Sweep, SweepRecord, Trial

CONFIG = load_config(None, ["epochs=9"])


@pytest.mark.parametrize(
    ("trials", "eta", "epochs", "rungs", "cost"),
    [
        (27, 3, 27, [(1, 27), (3, 9), (9, 3), (27, 1)], 27 + 18 + 18 + 18),
        (27, 3, 9, [(1, 27), (3, 9), (9, 3)], 27 + 18 + 18),
        (9, 3, 100, [(11, 9), (33, 3), (100, 1)], 99 + 66 + 67),
        (4, 2, 4, [(1, 4), (2, 2), (4, 1)], 4 + 2 + 2),
        (10, 3, 3, [(1, 10), (3, 3)], 10 + 6),
        (8, 2, 7, [(2, 8), (4, 4), (7, 2)], 16 + 8 + 6),
    ],
)
def test_rungs_end_at_the_last_epoch_and_cost_what_their_trials_add(
    trials: int, eta: int, epochs: int, rungs: list[tuple[int, int]], cost: int
) -> None:
    sweep = SweepConfig(space={"lr": (0.1, 0.2)}, trials=trials, eta=eta)
    starts = [0, *(end for end, _ in rungs)]
    assert sweep.rungs(epochs) == [Rung(start, *rung) for start, rung in zip(starts, rungs, strict=False)]
    assert sweep.cost(epochs) == cost
    assert rungs[-1][0] == epochs


@pytest.mark.parametrize(
    ("space", "refusal"),
    [
        ("lr: {low: 0.5, high: 0.1}", r"space.yaml: lr: low=0.5 must be less than high=0.1$"),
        ("lr: {low: 0, high: 1, log: true}", r"a range with log=true begins above 0"),
        ("lr: {low: 0.1, high: 1000}", r"space.yaml: lr: .*less than or equal to 100"),
        ("lr: 0.1", r"space.yaml: lr: write a list of values, or a range"),
        ("lr: []", r"space.yaml: lr: write a list of values, or a range"),
        ("learning_rate: [0.1]", r"space.yaml: learning_rate is no key that trials can differ in"),
        ("epochs: [3, 9]", r"space.yaml: epochs is no key that trials can differ in"),
        ("validate_every: [1, 3]", r"space.yaml: validate_every is no key that trials can differ in"),
        ("ranks: [1, 2]", r"space.yaml: ranks is no key that trials can differ in"),
        ("augment.shfit: [1, 2]", r"space.yaml: unknown key 'augment.shfit'; did you mean 'augment.shift'\?"),
        ("augment.shift: {low: 0, high: 3, step: 0}", r"space.yaml: augment.shift: step: .*greater than 0"),
        ("batch_size: [0, 64]", r"space.yaml: batch_size: name sizes; 0, which leaves the choice to Convoy, is none"),
        ("optimizer: [sgd, sdg]", r"space.yaml: optimizer: "),
        ("", r"space.yaml must hold keys with ranges or lists"),
        ("lr: [", r"space.yaml.*not valid YAML"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_line(tmp_path: Path, space: str, refusal: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(space)
    with pytest.raises(UsageError, match=refusal) as refused:
        read_sweep(file, {}, CONFIG)
    assert "\n" not in str(refused.value)


def test_a_sweep_too_small_to_stop_a_trial_early_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("lr: [0.1, 0.2]")
    for options, config in (({"trials": 2}, CONFIG), ({}, load_config(None, ["epochs=2"]))):
        with pytest.raises(UsageError, match="give it at least 3 epochs and 3 trials"):
            read_sweep(file, options, config)
    with pytest.raises(UsageError, match=r"^--metric: .*'val/accuracy' or 'val/loss'"):
        read_sweep(file, {"metric": "loss"}, CONFIG)
    assert read_sweep(file, {"trials": 9, "eta": None}, CONFIG).trials == 9


def test_values_replace_single_keys_of_a_configuration() -> None:
    given = load_config(None, ["epochs=9", "validate_every=3"])
    found = trial_config(given, {"lr": 0.5, "network.width": 8, "augment.shift": 1})
    assert (found.lr, found.epochs, found.augment.shift, found.augment.flip) == (0.5, 9, 1, True)
    assert found.validate_every == 1  # since trials are compared at any epoch
    assert value_of(found, "network.width") == 8
    assert value_of(found, "augment.shift") == 1
    assert value_of(found, "augment.nothing") is None


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        (Range(low=1, high=9, step=2), [1, 3, 9], [0, 2, 10, 3.0, True, None]),
        (Range(low=0.1, high=0.5), [0.1, 0.3, 0.5], [0.05, 0.6, "0.3"]),
        (Range(low=0.1, high=0.7, step=0.2), [0.1, 0.3, 0.5, 0.7], [0.2, 0.8]),
        (("sgd", "adam", None), ["adam", None], ["adamw"]),
    ],
)
def test_the_configuration_itself_is_a_trial_only_if_the_space_contains_it(
    values: Any, inside: list[Any], outside: list[Any]
) -> None:
    assert all(contains(values, value) for value in inside)
    assert not any(contains(values, value) for value in outside)


def test_a_trial_that_failed_at_a_later_rung_changes_nothing_in_a_resumed_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its score at the first rung was told to Optuna before it failed; a resumed sweep must tell the same."""
    config = SweepConfig(space={"lr": Range(low=0.01, high=1.0, log=True)}, trials=9, eta=3)
    record = SweepRecord(config=CONFIG, dataset=DatasetRef.model_construct(name="digits"), sweep=config)
    earlier: list[Trial] = []

    def train(sweep: Sweep, trial: Trial, config: RunConfig | None, rung: int) -> Trial:
        if trial.failed or rung in trial.scores:
            return trial
        if rung == 2 and trial.number == 1:
            return trial.model_copy(update={"failed": True})
        return trial.model_copy(update={"scores": {**trial.scores, rung: 1 - abs(float(trial.values["lr"]) - 0.2)}})

    monkeypatch.setattr("tasks.training.sweep._trials_of", lambda run: earlier)
    monkeypatch.setattr(Sweep, "_train", train)
    first = Sweep("run", record, lambda *_: None, 1).search()
    assert first[0].failed and 1 in first[0].scores
    earlier = first
    assert Sweep("run", record, lambda *_: None, 1).search() == first
