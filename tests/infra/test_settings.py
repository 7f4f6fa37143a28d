"""Settings come only from the environment; the refusal of an invalid value names the variable."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import UsageError
from infra.settings import Settings

STANDARD = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_URL",
    "PREFECT_UI_URL",
)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STANDARD, "CONVOY_HOME", "CONVOY_BUCKET"):
        monkeypatch.delenv(name, raising=False)


def test_without_variables_everything_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.home == tmp_path / ".convoy"
    assert settings.bucket == "convoy"
    assert (settings.s3_url, settings.mlflow_uri, settings.prefect_api_url) == (None, None, None)
    assert settings.cache == tmp_path / ".convoy" / "cache"
    assert settings.logs == tmp_path / ".convoy" / "logs"
    assert settings.runs == tmp_path / ".convoy" / "runs"


def test_each_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_HOME", "~/elsewhere")
    monkeypatch.setenv("CONVOY_BUCKET", "team-models")
    monkeypatch.setenv("CONVOY_MIRROR", "https://mirror.example/data")
    monkeypatch.setenv("CONVOY_CACHE_BYTES", "1.5GB")
    monkeypatch.setenv("CONVOY_S3_PORT", "9000")
    monkeypatch.setenv("CONVOY_MLFLOW_PORT", "9001")
    monkeypatch.setenv("CONVOY_PREFECT_PORT", "9002")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///tracking.db")
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    settings = Settings()
    assert settings.home == Path.home() / "elsewhere"
    assert settings.bucket == "team-models"
    assert settings.mirror == "https://mirror.example/data"
    assert settings.cache_bytes == 1_500_000_000
    assert (settings.s3_port, settings.mlflow_port, settings.prefect_port) == (9000, 9001, 9002)
    assert settings.s3_url == "https://s3.example"
    assert settings.mlflow_uri == "sqlite:///tracking.db"
    assert settings.prefect_api_url == "https://prefect.example/api"


def test_the_variable_for_s3_alone_wins_over_the_one_for_all_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://all.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    assert Settings().s3_url == "https://s3.example"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STANDARD, "CONVOY_S3_PORT", "CONVOY_BUCKET"):
        monkeypatch.setenv(name, "")
    settings = Settings()
    assert (settings.s3_url, settings.mlflow_uri, settings.prefect_api_url) == (None, None, None)
    assert (settings.s3_port, settings.bucket) == (None, "convoy")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CONVOY_CACHE_BYTES", "plenty"),
        ("CONVOY_CACHE_BYTES", "0"),
        ("CONVOY_S3_PORT", "eighty"),
        ("CONVOY_MLFLOW_PORT", "99999"),
        ("CONVOY_PREFECT_PORT", "80"),
        ("CONVOY_BUCKET", "No_Such_Name"),
        ("CONVOY_HOME", "~no-such-user/convoy"),
        ("AWS_ENDPOINT_URL", "localhost:9000"),
        ("AWS_ENDPOINT_URL", "http://localhost:nine"),
        ("MLFLOW_TRACKING_URI", "localhost:5000"),
        ("MLFLOW_TRACKING_URI", "http://localhost:nine"),
        ("PREFECT_API_URL", "ftp://prefect.example/api"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=variable) as refusal:
        Settings()
    assert "\n" not in str(refusal.value)


def test_a_refused_address_does_not_repeat_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "postgres://user:hunter2@prefect.example")
    with pytest.raises(UsageError) as refusal:
        Settings()
    assert "hunter2" not in str(refusal.value)


def test_the_stack_is_imported_without_the_slow_libraries() -> None:
    slow = ("torch", "mlflow", "prefect", "boto3", "cryptography")
    program = f"import sys, infra.stack.local_stack; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
