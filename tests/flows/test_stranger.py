"""A team's way: images, label table, network and settings lie in its own folder, and nothing inside Convoy is edited.

The folder has packages with the names of Convoy's. Some labels are wrong on purpose; three that are found are mended.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from PIL import Image
from sklearn.datasets import load_digits

from tests.flows.program import wait_for

CONVOY = Path(sys.executable).with_name("convoy")
MOST_COMMANDS = 12
SETTINGS = """
dataset: labels.csv
name: digits-of-patients
model: my_network:SmallNet
epochs: 12
batch_size: 64
network: {width: 24}
augment: {flip: false}
data: {group: patient, slices: [camera, site]}
gate: {min_class_recall: 0, margin: 0.05}
serving: {http: false}
deploy: {pool: strangers}
"""


class Team:
    """A folder of its own, and the commands that were given in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = 0

    def convoy(self, *arguments: str) -> str:
        """Runs a command; returns its standard output."""
        self.commands += 1
        done = subprocess.run([CONVOY, *arguments], cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def summary(self, *arguments: str) -> dict[str, Any]:
        self.convoy(*arguments, "--summary", "summary.json")
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_bytes())
        return found

    def rows(self, file: str) -> list[dict[str, str]]:
        with (self.folder / file).open(newline="") as stream:
            return list(csv.DictReader(stream))

    def write(self, file: str, rows: list[dict[str, str]]) -> None:
        with (self.folder / file).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture
def team(tmp_path: Path, stack: object) -> Team:
    for package in ("tasks", "cnn"):  # of the team's own, with the names of ours
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('not this one')")
    digits = load_digits()
    rows = []
    (tmp_path / "scans").mkdir()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"scans/{number:04}.png"
        Image.fromarray((pixels * 15).astype("uint8")).save(tmp_path / name)
        camera, site = ("left", "right")[number % 2], ("Bern", "Oslo", "")[number // 7 % 3]
        rows.append(
            {"path": name, "label": f"digit {label}", "camera": camera, "site": site, "patient": f"p{number // 6}"}
        )
    made = Team(tmp_path)
    made.write("labels.csv", rows)
    return made


@pytest.fixture
def worker(team: Team) -> Iterator["subprocess.Popen[bytes]"]:
    """Its working folder is the project."""
    with (team.folder / "worker.log").open("wb") as log:
        started = subprocess.Popen([CONVOY, "worker", "--pool", "strangers"], cwd=team.folder, stdout=log, stderr=log)
    yield started
    started.terminate()
    started.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_team_keeps_images_labels_network_and_settings_in_its_own_folder(
    team: Team, worker: "subprocess.Popen[bytes]", tmp_path_factory: pytest.TempPathFactory
) -> None:
    truth = {row["path"]: row["label"] for row in team.rows("labels.csv")}
    wrong = dict.fromkeys(f"scans/{number:04}.png" for number in range(20, len(truth), 45))
    spoiled = team.rows("labels.csv")
    for row in spoiled:
        if row["path"] in wrong:
            row["label"] = wrong[row["path"]] = f"digit {(int(row['label'][-1]) + 5) % 10}"
    team.write("labels.csv", spoiled)

    team.convoy("init")
    assert "class SmallNet" in (team.folder / "my_network.py").read_text()
    (team.folder / "convoy.yaml").write_text(SETTINGS)
    first = team.summary("train", "--ranks", "2")
    assert first["champion"] and first["accuracy"] > 0.9
    again = team.summary("train", "--ranks", "1", "--set", "promote=false")
    assert again["weights_sha256"] == first["weights_sha256"]

    # What went wrong, and where.
    report = Path(
        download_artifacts(
            run_id=first["mlflow_run_id"],
            artifact_path="report",
            dst_path=str(tmp_path_factory.mktemp("report")),
        )
    )
    page = (report / "evaluation.md").read_text()
    assert "| scans/" in page and "| camera | accuracy |" in page and "| site | accuracy |" in page
    evaluated = json.loads((report / "evaluation.json").read_bytes())
    assert {each["value"] for each in evaluated["slices"]["camera"]} == {"left", "right"}
    assert "group\\_leakage" in (report / "data.md").read_text() or "group_leakage" in (report / "data.md").read_text()
    shown = team.convoy("data", "show", "digits-of-patients", "--out", "images.csv")
    assert "column camera   " in shown and "groups          300" in shown
    split_of = {}
    for row in team.rows("images.csv"):
        assert split_of.setdefault(row["group"], row["split"]) == row["split"]

    # Labels that are probably wrong are found, and corrected by a person.
    team.convoy("errors", "digits-of-patients", "--out", "errors.csv")
    suspects = team.rows("errors.csv")
    found = [row for row in suspects if row["path"] in wrong][:3]
    assert len(found) == 3 and len(suspects) < 10 * len(wrong)
    for row in found:
        assert row["label"] == wrong[row["path"]]
        row["label"] = truth[row["path"]]
    team.write("errors.csv", found)
    team.convoy("errors", "digits-of-patients", "--corrected", "errors.csv", "--out", "corrected.csv")
    corrected = team.rows("corrected.csv")
    given = {row["path"]: row["label"] for row in spoiled} | {row["path"]: row["label"] for row in found}
    assert {row["path"]: row["label"] for row in corrected} == given
    assert all(row["camera"] in ("left", "right") and row["patient"] for row in corrected)
    shutil.copy(team.folder / "corrected.csv", team.folder / "labels.csv")

    # A deployment of the same file retrains, since the labels have changed, on a worker in this folder.
    team.convoy("deploy")
    log = team.folder / "worker.log"
    wait_for(lambda: worker.poll() is None and b"started" in log.read_bytes(), "the worker to start")
    done = json.loads(team.convoy("retrain", "-d", "retrain/digits-of-patients", "--wait", "--json"))
    assert done["status"] == "done" and done["champion"], done
    changes = team.convoy("data", "diff", "digits-of-patients@previous", "digits-of-patients")
    assert changes.splitlines()[0].startswith("3 relabelled")
    data = Path(download_artifacts(run_id=done["mlflow_run_id"], artifact_path="report/data.md")).read_text()
    assert "Images since the champion's data: 3 relabelled" in data
    assert team.commands <= MOST_COMMANDS - 1  # and `convoy worker`
    assert not any(name.startswith("CONVOY_PROJECT") for name in os.environ)
