"""The files of the team's services, checked without a container engine."""

import importlib.util
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.stack.endpoints import TELEMETRY_OFF
from infra.team_secrets import CLIENT, SERVICES, make
from tests.infra.team import COMPOSE, REPOSITORY, compose, variables_of
from tests.linters import program

INFRA = COMPOSE.parent
TOO_SHORT = 24  # characters of a password


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    make(tmp_path)
    return variables_of(tmp_path / SERVICES)


@pytest.fixture
def services(variables: dict[str, str]) -> dict[str, Any]:
    return dict(compose(variables)["services"])


def test_compose_takes_the_file(tmp_path: Path) -> None:
    make(tmp_path)
    command = [program("docker-compose"), "--env-file", str(tmp_path / SERVICES), "-f", str(COMPOSE), "config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = compose(variables_of(tmp_path / SERVICES))["services"]
    theirs = yaml.safe_load(done.stdout)["services"]
    assert theirs.keys() == ours.keys()
    for name, service in theirs.items():  # so what tests run is what Compose would run
        assert service.get("command") == ours[name].get("command")
        assert service.get("environment", {}) == ours[name].get("environment", {})


def test_without_secrets_compose_says_how_to_make_them(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    command = [program("docker-compose"), "--env-file", str(tmp_path / "empty"), "-f", str(COMPOSE), "config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "run make team-secrets" in done.stderr
    with pytest.raises(KeyError, match="run make team-secrets"):
        compose({})


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([program("hadolint"), str(INFRA / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_files_hold_no_secret_and_all_secrets_come_from_variables() -> None:
    for file in (COMPOSE, INFRA / "mlflow-auth.ini", INFRA / "databases.sql", INFRA / "Dockerfile"):
        for line in file.read_text().splitlines():
            if given := re.search(r"^\s*[\w-]*(?:PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY_ID)\w*[:=]\s*(.*)", line, re.I):
                assert re.fullmatch(r"\$\{\w+:\?run make team-secrets\}", given[1]), line


def test_no_command_or_address_has_a_secret(variables: dict[str, str], services: dict[str, Any]) -> None:
    secrets = [value.rpartition(":")[2] for value in variables.values()]
    for service in services.values():
        words = [*service.get("command", ()), *service.get("healthcheck", {}).get("test", ())]
        addresses = [value for value in service.get("environment", {}).values() if "://" in value]
        assert not any(secret in text for secret in secrets for text in (*words, *addresses))


def test_ports_are_published_on_the_loopback_address(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", ())}
    assert published.keys() == {"seaweedfs", "mlflow", "prefect"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())


def test_the_store_and_the_databases_are_on_networks_of_those_who_use_them(services: dict[str, Any]) -> None:
    def on(network: str) -> set[str]:
        connected = {name: service for name, service in services.items() if service.get("network_mode") != "none"}
        return {name for name, service in connected.items() if network in service.get("networks", ("default",))}

    assert on("databases") == {"postgres", "mlflow", "prefect"}
    assert on("storage") == {"seaweedfs", "mlflow", "worker"}
    assert on("default") == {"mlflow", "prefect", "deploy", "worker"}


def test_services_start_when_what_they_need_is_healthy(services: dict[str, Any]) -> None:
    needs = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert needs["mlflow"].keys() == {"postgres", "seaweedfs"} and needs["prefect"].keys() == {"postgres"}
    assert needs["worker"].keys() == {"seaweedfs", "mlflow", "prefect", "deploy"}
    for name, others in needs.items():
        for other, how in others.items():
            lasting = services[other].get("restart") == "unless-stopped"
            assert how == {"condition": "service_healthy" if lasting else "service_completed_successfully"}, name
            assert "healthcheck" in services[other] or not lasting


def test_every_service_is_quiet_and_has_no_more_rights_than_it_needs(services: dict[str, Any]) -> None:
    for name in ("mlflow", "prefect", "deploy", "worker"):
        assert services[name]["environment"].items() >= TELEMETRY_OFF.items()
    assert "-master.telemetry=false" in services["seaweedfs"]["command"]
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    for name, service in services.items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service.get("cap_drop") == ["ALL"] or name == "postgres"
    assert re.search(r"^USER \d+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)


def test_secrets_are_random_private_and_made_once(tmp_path: Path) -> None:
    files = make(tmp_path)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    before = [file.read_bytes() for file in files]
    with pytest.raises(FileExistsError, match="already"):
        make(tmp_path)
    assert [file.read_bytes() for file in files] == before
    (tmp_path / "other").mkdir()
    make(tmp_path / "other")
    mine, theirs = variables_of(tmp_path / SERVICES), variables_of(tmp_path / "other" / SERVICES)
    assert len(set(mine.values())) == len(mine)
    for name, value in mine.items():
        assert value != theirs[name]
        assert len(value) >= TOO_SHORT or name == "S3_ACCESS_KEY_ID"


def test_a_shell_reads_the_clients_variables(tmp_path: Path) -> None:
    make(tmp_path)
    script = f"set -a; . {tmp_path / CLIENT}; exec env"
    done = subprocess.run(["sh", "-euc", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert set(done.stdout.splitlines()) >= set((tmp_path / CLIENT).read_text().splitlines())


def test_a_build_does_not_get_what_is_secret_or_large() -> None:
    taken = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert not {"!.git", "!.convoy", "!.venv", "!tests"} & set(taken)
    assert "**/.*" in (REPOSITORY / ".dockerignore").read_text().splitlines()  # infra/.env is one


def test_the_image_has_the_programs_that_a_worker_calls() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert re.search(r"^RUN pip install .* uv==\d", text, re.MULTILINE)
    assert re.search(r"apt-get install .* git ", text.partition("AS build")[2].partition("\nFROM ")[2])


def test_the_lock_without_torch_is_what_the_dockerfile_says(tmp_path: Path) -> None:
    text = (INFRA / "Dockerfile").read_text()
    script = re.search(r"awk '([^']+)'", text)
    assert script
    lock = REPOSITORY / "requirements.lock"
    kept = subprocess.run(["awk", script[1], lock], capture_output=True, text=True, check=True).stdout
    names = {line.partition("==")[0] for line in kept.splitlines() if line[:1].isalpha()}
    everything = {line.partition("==")[0] for line in lock.read_text().splitlines() if line[:1].isalpha()}
    gone = everything - names
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(name in ("torch", "torchvision", "triton") or name.startswith(("nvidia-", "cuda-")) for name in gone)
    assert {"torchmetrics", "mlflow", "psycopg2-binary", "flask-wtf"} <= names
    assert kept.count("==") <= kept.count("--hash=sha256:")


def test_every_database_address_names_a_driver_that_is_installed() -> None:
    """SQLAlchemy's default driver changes from version to version."""
    files = [COMPOSE, INFRA / "mlflow-auth.ini"]
    addresses = [found for file in files for found in re.findall(r"postgresql(?:\+(\w+))?://", file.read_text())]
    assert len(addresses) == 3 and all(addresses)
    assert [driver for driver in addresses if importlib.util.find_spec(driver) is None] == []
