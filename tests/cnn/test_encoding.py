"""Compressed shards: their format, what is lost and said of it, and which images can be stored so."""

from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_image
from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

from cnn.config.preprocessing import PreprocessConfig, Resize
from cnn.data.encoding import decode, encode
from cnn.data.manifest import Manifest, SplitInfo
from cnn.data.shard_writer import shard_path
from cnn.errors import InputError
from cnn.preprocessing.pack import preprocess

PHOTO = load_sample_image("china.jpg")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Pieces of a photograph in two classes."""
    (tmp_path / "images").mkdir()
    found = {}
    for number in range(60):
        top, left = number // 10 * 60, number % 10 * 60
        path = tmp_path / "images" / f"{number}"
        Image.fromarray(PHOTO[top : top + 48, left : left + 48]).save(path, "PNG")
        found[f"{'sky' if top < 180 else 'ground'}/{number:02}.png"] = path
    return found


def packed(files: dict[str, Path], out: Path, **config: object) -> Manifest:
    out.mkdir()
    return preprocess("folder", files, PreprocessConfig.model_validate(config), out)


def contents(out: Path, info: SplitInfo) -> list[bytes]:
    """Returns the files in a split's shards, after checking the shards' form."""
    found = []
    for shard in info.shards:
        tensors = load_file(shard_path(out, shard.sha256))
        encoded, offsets, labels = (tensors.pop(name) for name in ("encoded", "offsets", "labels"))
        assert not tensors and (encoded.dtype, offsets.dtype, labels.dtype) == (np.uint8, np.int64, np.int64)
        assert encoded.ndim == 1 and offsets.shape == (shard.count + 1,) and labels.shape == (shard.count,)
        assert offsets[0] == 0 and offsets[-1] == len(encoded)
        found += [encoded[start:stop].tobytes() for start, stop in pairwise(offsets)]
    return found


@pytest.mark.parametrize(("encoding", "channels"), [("jpeg", 3), ("jpeg", 1), ("webp", 3)])
def test_mean_and_std_are_of_what_torchvision_decodes(
    files: dict[str, Path], tmp_path: Path, encoding: str, channels: int
) -> None:
    manifest = packed(files, tmp_path / "out", encoding=encoding, channels=channels, image_size=40)
    assert manifest.encoding == encoding
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    read = decode_jpeg if encoding == "jpeg" else decode_webp
    images = []
    for file in contents(tmp_path / "out", manifest.splits["train"]):
        image = read(torch.frombuffer(bytearray(file), dtype=torch.uint8), mode=mode).numpy()
        assert (decode(file) == image).all() and image.shape == (channels, 40, 40)
        images.append(image / 255)
    assert manifest.mean == pytest.approx(np.mean(images, axis=(0, 2, 3)), rel=1e-12)
    assert manifest.std == pytest.approx(np.std(images, axis=(0, 2, 3)), rel=1e-9)


def test_the_same_images_are_packed_in_a_fraction_of_the_space(files: dict[str, Path], tmp_path: Path) -> None:
    manifests = {
        encoding: packed(files, tmp_path / encoding, encoding=encoding) for encoding in ("raw", "jpeg", "webp")
    }
    sizes = {
        encoding: sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
        for encoding, manifest in manifests.items()
    }
    assert max(sizes["jpeg"], sizes["webp"]) < sizes["raw"] / 2
    raw = manifests["raw"].splits["train"]
    pixels = np.concatenate([load_file(shard_path(tmp_path / "raw", shard.sha256))["images"] for shard in raw.shards])
    for encoding in ("jpeg", "webp"):
        lossy = [decode(file) for file in contents(tmp_path / encoding, manifests[encoding].splits["train"])]
        assert np.abs(np.stack(lossy).astype(int) - pixels).mean() < 8
        assert manifests[encoding].splits["train"].class_counts == raw.class_counts


@pytest.mark.parametrize("resize", get_args(Resize))
def test_compressed_images_have_the_same_geometry(tmp_path: Path, resize: str) -> None:
    (tmp_path / "images").mkdir()
    files = {}
    for number in range(40):
        path = tmp_path / "images" / f"{number}"
        Image.fromarray(PHOTO[number : number + 96, : 150 if number % 2 else 64]).save(path, "PNG")
        files[f"{'ab'[number // 20]}/{number:02}.png"] = path
    config = {"resize": resize, "image_size": 48}
    raw = packed(files, tmp_path / "raw", **config)
    pixels = [load_file(shard_path(tmp_path / "raw", each.sha256))["images"] for each in raw.splits["train"].shards]
    for encoding in ("jpeg", "webp"):
        manifest = packed(files, tmp_path / encoding, encoding=encoding, **config)
        lossy = [decode(file) for file in contents(tmp_path / encoding, manifest.splits["train"])]
        assert manifest.resize == resize
        assert np.abs(np.stack(lossy).astype(int) - np.concatenate(pixels)).mean() < 8


def test_quality_trades_space_for_truth() -> None:
    image = PHOTO[:64, :64].transpose(2, 0, 1)
    sizes = [len(encode([image], "jpeg", quality)[0]) for quality in (50, 75, 95)]
    assert sizes == sorted(sizes)


def test_encoded_shards_end_before_they_are_too_large(files: dict[str, Path], tmp_path: Path) -> None:
    manifest = packed(files, tmp_path / "out", encoding="jpeg", shard_bytes="4KiB")
    shards = manifest.splits["train"].shards
    whole = packed(files, tmp_path / "whole", encoding="jpeg")
    assert len(shards) > 5
    for shard in shards:
        encoded = load_file(shard_path(tmp_path / "out", shard.sha256))["encoded"]
        assert len(encoded) <= 4096 or shard.count == 1
    one = contents(tmp_path / "whole", whole.splits["train"])
    assert contents(tmp_path / "out", manifest.splits["train"]) == one
    assert (manifest.mean, manifest.std) == (whole.mean, whole.std)


def test_grey_images_as_webp_are_refused_with_advice(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"webp is for colour images.*use jpeg, or data\.channels 3"):
        packed(files, tmp_path / "out", encoding="webp", channels=1)


def test_a_manifest_of_pixels_says_nothing_of_encodings(files: dict[str, Path], tmp_path: Path) -> None:
    raw, jpeg = (packed(files, tmp_path / encoding, encoding=encoding) for encoding in ("raw", "jpeg"))
    assert b"encoding" not in raw.to_bytes() and b'"encoding":"jpeg"' in jpeg.to_bytes()
    for manifest in (raw, jpeg):
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest
