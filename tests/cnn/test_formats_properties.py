"""Whatever a source holds, it is loaded or refused in one line, within a time and a memory."""

import gzip
import io
import json
import re
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn.data.manifest import Losses, Manifest, Shard, SourceReport, SplitInfo, Spread
from cnn.data.splits import SPLITS
from cnn.errors import InputError
from cnn.formats import Format, open_source
from cnn.formats.decode import Target, decode_image, read_header
from cnn.formats.layout import arrange

MEMORY = 64 * 2**20  # bytes; all that is tried is smaller than a megabyte

bounded = settings(
    max_examples=60,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=True,  # the suite tries the same each time; raise max_examples and take this away to search
    database=None,
)

PNG = io.BytesIO()
Image.frombytes("L", (4, 4), bytes(range(0, 160, 10))).save(PNG, "PNG")

JPEG = io.BytesIO()
Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(JPEG, "JPEG")


@contextmanager
def within_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def loads_or_is_refused(format: Format, files: dict[str, bytes]) -> bool:
    """Whether every image of the source was read."""
    with tempfile.TemporaryDirectory() as folder, within_memory():
        places = {}
        for number, (path, content) in enumerate(files.items()):
            places[path] = Path(folder) / str(number)
            places[path].write_bytes(content)
        try:
            source = open_source(format, places)
            count = 0
            for block in source.blocks():
                block.survey()
                done = block.decode(np.ones(len(block.labels), dtype=np.bool_), Target(4, 1))
                assert len(done.images) + len(done.unreadable) == len(block.labels)
                assert block.labels.max() < len(source.classes)
                count += len(block.labels)
            assert count == len(source) > 0
        except InputError as error:
            assert_one_line(error)
            return False
    return True


def assert_one_line(error: Exception) -> None:
    text = str(error)
    assert text and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text), error


def damaged(data: bytes, places: Iterable[tuple[int, int]], cut: int | None) -> bytes:
    """With other bytes in some places, and its end cut off."""
    spoilt = bytearray(data)
    for place, byte in places if spoilt else ():
        spoilt[place % len(spoilt)] = byte
    return bytes(spoilt if cut is None else spoilt[: cut % (len(spoilt) + 1)])


damage = st.tuples(
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4),
    st.none() | st.integers(0, 2**16),
)
parts = st.sampled_from([b"a", b"b", b"train", b"test", b".", b"..", b"", b"caf\xc3\xa9", b"\x95\x5c", b"\xff", b"\n"])
names = st.lists(parts | st.binary(max_size=6), min_size=1, max_size=4).map(b"/".join)
contents = st.sampled_from([PNG.getvalue(), b"", b"no image"])
members = st.dictionaries(st.builds(bytes.__add__, names, st.sampled_from([b"/1.png", b".jpg", b"/", b""])), contents)
classes = {b"a/1.png": PNG.getvalue(), b"b/1.png": PNG.getvalue()}


class _Raw(str):
    """A name that zipfile writes as these bytes."""

    raw: bytes
    flag: bool

    def __new__(cls, raw: bytes, utf8: bool) -> "_Raw":
        self = super().__new__(cls, f"{raw!r}")
        self.raw, self.flag = raw, utf8
        return self

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        if encoding == "ascii" and self.flag:
            raise UnicodeEncodeError("ascii", "x", 0, 1, "take UTF-8")
        return self.raw


def zipped(files: dict[bytes, bytes], utf8: bool) -> bytes:
    """A zip with names of any bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo()
            info.orig_filename = info.filename = _Raw(name, utf8)
            archive.writestr(info, content)
    return buffer.getvalue()


def tarred(files: dict[bytes, bytes], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name.decode(errors="surrogateescape").replace("\0", "0"))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@bounded
@given(members, st.booleans(), damage)
def test_a_zip_of_anything(files: dict[bytes, bytes], utf8: bool, damage: tuple[list[tuple[int, int]], int]) -> None:
    loads_or_is_refused("archive", {"d.zip": damaged(zipped(classes | files, utf8), *damage)})


@bounded
@given(members, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans(), damage)
def test_a_tar_of_anything(
    files: dict[bytes, bytes], format: int, inside: bool, damage: tuple[list[tuple[int, int]], int]
) -> None:
    data = tarred(classes | files, format)
    data = gzip.compress(damaged(data, *damage), 1) if inside else damaged(gzip.compress(data, 1), *damage)
    loads_or_is_refused("archive", {"d.tar.gz": data})


@bounded
@given(st.binary(min_size=512, max_size=512), st.sampled_from(b"0x"), st.sampled_from(b"gxLKS05"), st.booleans())
def test_a_tar_whose_header_says_anything(noise: bytes, size: int, type: int, honest: bool) -> None:
    """With a checksum that is right."""
    header = bytearray(noise)
    header[124:136] = b"%011o\0" % 200 if honest else header[124:136]
    header[156], header[148:156] = type, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    body = noise + b"30 GNU.sparse.size=-9\n9 size=-1\n" + noise
    loads_or_is_refused("archive", {"d.tar": bytes(header) + body[:512] + tarred(classes, tarfile.USTAR_FORMAT)})


@bounded
@given(st.lists(st.integers(0, 6) | st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.binary(max_size=200), damage)
def test_idx_files_of_anything(
    sizes: list[int], pixels: bytes, damage: tuple[list[tuple[int, int]], int | None]
) -> None:
    images = struct.pack(">4I", 0x803, *sizes) + pixels
    labels = struct.pack(">2I", 0x801, sizes[0]) + pixels[: sizes[0]]
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    loads_or_is_refused("idx", dict(zip(names, (damaged(images, *damage), labels), strict=True)))
    whole = struct.pack(">4I", 0x803, 3, 2, 2) + bytes(12), struct.pack(">2I", 0x801, 3) + bytes([0, 1, 1])
    assert loads_or_is_refused("idx", dict(zip(names, whole, strict=True)))


@bounded
@given(
    st.sampled_from([b"batches.meta.txt", b"fine_label_names.txt", b"meta"]),
    st.binary(max_size=40),
    st.lists(st.binary(max_size=2).map(lambda label: label + bytes(3072)), max_size=3),
    damage,
)
def test_cifar_files_of_anything(
    list_name: bytes, classes: bytes, records: list[bytes], damage: tuple[list[tuple[int, int]], int | None]
) -> None:
    batches = {b"d/data_batch_1.bin": b"".join(records), b"d/test_batch.bin": b"".join(records[:1])}
    data = tarred({b"d/" + list_name: classes, **batches}, tarfile.USTAR_FORMAT)
    loads_or_is_refused("cifar", {"d.tar": data})
    loads_or_is_refused("cifar", {"d.tar": damaged(data, *damage)})


PREFIXES = st.sampled_from(
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0",
        b"MPF\0II*\0\x08\0\0\0",
        b"ICC_PROFILE\0\x01\x01",
        b"Photoshop 3.0\x008BIM\x03\xed",
        b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='9'/>",
        b"FPXR\0",
    ]
)
told = st.builds(bytes.__add__, PREFIXES, st.binary(max_size=60))


@bounded
@given(st.lists(st.tuples(st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]), told), max_size=4))
def test_what_a_jpeg_says_of_itself(segments: list[tuple[int, bytes]]) -> None:
    data = JPEG.getvalue()
    said = b"".join(struct.pack(">BBH", 0xFF, marker, len(text) + 2) + text for marker, text in segments)
    with within_memory():
        assert read_header(data[:2] + said + data[2:]).width == 16
        decode_image(data[:2] + said + data[2:], Target(16, 3))


KINDS = st.sampled_from(
    [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"tIME", b"sRGB", b"abCd"]
)
KEYS = st.sampled_from([b"", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0\1\0\0\0", b"icc\0\0"])


@bounded
@given(st.lists(st.tuples(KINDS, KEYS, told, st.booleans(), st.booleans()), max_size=4), st.booleans())
def test_what_a_png_says_of_itself(chunks: list[tuple[bytes, bytes, bytes, bool, bool]], behind: bool) -> None:
    said = b""
    for kind, key, text, packed, right in chunks:
        body = key + (zlib.compress(text * 1000) if packed else text)
        said += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if right else 7)
    data = PNG.getvalue()
    place = -12 if behind else 33
    with within_memory():
        assert read_header(data[:place] + said + data[place:]).width == 4
        decode_image(data[:place] + said + data[place:], Target(4, 1))


@bounded
@given(st.sampled_from([PNG.getvalue(), JPEG.getvalue()]), damage)
def test_a_damaged_image_is_read_or_named(data: bytes, damage: tuple[list[tuple[int, int]], int | None]) -> None:
    good, bad = PNG.getvalue(), damaged(data, *damage)
    assert loads_or_is_refused("folder", {"a/1.png": bad, "b/1.png": good})


MANIFEST = Manifest(
    classes=("a", "b"),
    channels=1,
    image_size=4,
    splits={
        split: SplitInfo(count=2, class_counts=(1, 1), shards=(Shard(sha256="0" * 64, count=2, bytes=9),))
        for split in SPLITS
    },
    mean=(0.5,),
    std=(0.5,),
    report=SourceReport(
        images=6,
        packed=6,
        unreadable=0,
        unreadable_examples=(),
        duplicates=0,
        width=Spread(min=1, median=1, max=1),
        height=Spread(min=1, median=1, max=1),
        modes={"L": 6},
        warnings=("one",),
        left_out={"a": Losses(images=1, left_out=1)},
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@bounded
@given(damage, st.sampled_from([*MANIFEST.model_dump(), "other"]), json_values)
def test_a_manifest_is_read_or_refused(
    damage: tuple[list[tuple[int, int]], int | None], key: str, value: object
) -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    changed = json.dumps(MANIFEST.model_dump(mode="json") | {key: value}).encode()
    for data in (changed, damaged(MANIFEST.to_bytes(), *damage), damage[1].__repr__().encode()):
        try:
            Manifest.from_bytes(data).to_bytes()
        except InputError as error:
            assert_one_line(error)


words = st.sampled_from(["train", "test_set", "val", "seg_pred", "a", "b", "é", "e\u0301", "dev", "unlabelled"])
paths = st.lists(words | st.text(max_size=4), min_size=1, max_size=4).map("/".join)


@settings(bounded, max_examples=150)
@given(st.sets(paths, max_size=8), st.sets(paths, max_size=4), st.sets(paths, max_size=4))
def test_paths_of_anything(images: set[str], folders: set[str], unreachable: set[str]) -> None:
    files = sorted(f"{path}.png" for path in images)
    try:
        layout = arrange(files, folders, unreachable)
    except InputError as error:
        assert_one_line(error)
        return
    assert len(layout.classes) >= 2 and list(layout.classes) == sorted(set(layout.classes))
    assert set(layout.labels.tolist()) == set(range(len(layout.classes)))
    assert all(remark and "\n" not in remark for remark in layout.left_out.remarks)
    kept = [files[position] for position in layout.chosen]
    again = arrange(kept)  # as preprocessing sees what the download has kept
    assert (again.classes, again.labels.tolist(), again.splits.tolist()) == (
        layout.classes,
        layout.labels.tolist(),
        layout.splits.tolist(),
    )
    assert again.left_out.remarks == () and [kept[position] for position in again.chosen] == kept


def test_the_archives_that_are_spoilt_above_are_whole() -> None:
    assert loads_or_is_refused("archive", {"d.zip": zipped(classes, utf8=False)})
    assert loads_or_is_refused("archive", {"d.tar": tarred(classes, tarfile.PAX_FORMAT)})
    strange = {b"\x82\xa0/1.png": PNG.getvalue()}
    assert not loads_or_is_refused("archive", {"d.zip": zipped(classes | strange, utf8=False)})
    assert not loads_or_is_refused("archive", {"d.tar": tarred(classes | strange, tarfile.GNU_FORMAT)})
    with pytest.raises(AssertionError):
        assert_one_line(ValueError("two\nlines"))
    assert str(InputError("two\nlines \x1b[31m \ud800 café 日本")) == r"two\nlines \x1b[31m \ud800 café 日本"
