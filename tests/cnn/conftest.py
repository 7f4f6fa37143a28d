"""The digits of scikit-learn (1 797 real images of 8×8 pixels), packed once a session."""

import gzip
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest

from cnn.config import PreprocessConfig
from cnn.manifest import Manifest
from cnn.packed import PackedSplit
from cnn.preprocess import preprocess


@dataclass(frozen=True)
class Packed:
    folder: Path
    manifest: Manifest

    def split(self, name: str) -> PackedSplit:
        return PackedSplit([self.folder / f"{shard.sha256}.safetensors" for shard in self.manifest.splits[name].shards])


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("digits")
    csv = folder / "digits.csv"
    csv.write_bytes(gzip.decompress(files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()))
    manifest = preprocess("digits", {"digits.csv": csv}, PreprocessConfig(), folder)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return Packed(folder, manifest)
