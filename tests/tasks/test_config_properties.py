"""Any configuration file or setting is accepted, or refused in one line."""

import tempfile
from datetime import timedelta
from pathlib import Path
from unicodedata import category

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn.config.networks import NETWORKS
from infra.errors import UsageError
from tasks.config.gates import GateConfig
from tasks.config.key_values import from_settings, known_keys
from tasks.config.retention import RetentionConfig
from tasks.config.run import RunConfig, load_config

bounded = settings(max_examples=100, deadline=timedelta(seconds=5), derandomize=True, database=None)

KEYS = sorted(known_keys(RunConfig, "notes"))
ODD = ["2026-13-45", "!!int x", "!!float x", "!!timestamp x", "&a [*a]", "{[1]: 2}", "!!set {a}", "1e400"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def refused_in_one_line(text: str) -> None:
    assert text.strip() and not any(category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


@bounded
@given(st.binary(max_size=200) | st.sampled_from(ODD).map(lambda text: f"lr: {text}".encode()))
def test_any_bytes_as_a_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(data)
        try:
            load_config(file)
        except UsageError as error:
            refused_in_one_line(str(error))


@pytest.mark.long
@bounded
@given(st.dictionaries(st.sampled_from([key.split(".")[0] for key in KEYS]) | st.text(max_size=8), VALUES, max_size=4))
def test_any_values_of_known_and_unknown_keys_in_a_file(values: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(values, allow_unicode=True))
        try:
            config = load_config(file)
        except UsageError as error:
            refused_in_one_line(str(error))
        else:
            assert RunConfig.model_validate(config.model_dump(exclude_unset=True)) == config


@bounded
@given(
    st.sampled_from(KEYS),
    st.sampled_from(ODD) | st.text(max_size=30) | VALUES.map(str),
    st.sampled_from([*sorted(NETWORKS), "timm/resnet18d"]),
)
def test_any_text_as_the_value_of_a_setting(key: str, value: str, network: str) -> None:
    try:
        load_config(None, [f"{key}={value}"], {"model": network})
    except UsageError as error:
        refused_in_one_line(str(error))


@bounded
@given(st.lists(st.text(max_size=30), max_size=3))
def test_any_text_as_a_setting(given_settings: list[str]) -> None:
    try:
        load_config(None, given_settings)
    except UsageError as error:
        refused_in_one_line(str(error))


@pytest.mark.parametrize("model", [GateConfig, RetentionConfig])
def test_any_text_as_a_setting_of_a_gate_or_an_age(model: type[GateConfig | RetentionConfig]) -> None:
    @bounded
    @given(
        st.sampled_from(sorted(model.model_fields)) | st.text(max_size=8), st.sampled_from(ODD) | st.text(max_size=20)
    )
    def holds(key: str, value: str) -> None:
        try:
            from_settings(model, [f"{key}={value}"], example="key=1")
        except UsageError as error:
            refused_in_one_line(str(error))

    holds()
