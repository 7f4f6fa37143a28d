"""Archives are checked before they are read, and read without extracting anything."""

import gzip
import io
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cnn.errors import InputError
from cnn.formats import archive as archives
from cnn.formats import open_source
from cnn.formats.decode import Target

KINDS = ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2"]


def digit_pngs(count: int = 40) -> dict[str, bytes]:
    digits = load_digits()
    contents = {}
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(buffer, "PNG")
        contents[f"digits/{label}/{number}.png"] = buffer.getvalue()
    return contents


def write(path: Path, contents: dict[str, bytes], kind: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
            for name, content in contents.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_by_content_and_read(tmp_path: Path, kind: str) -> None:
    contents = digit_pngs()
    source = open_source("archive", {f"d.{kind}": write(tmp_path / "digest", contents, kind)})
    digits = load_digits()
    for _ in range(2):  # each pass gives the same
        seen = {}
        for block in source.blocks():
            pixels = block.decode(np.ones(len(block.labels), dtype=np.bool_), Target(8, 1)).images[:, 0]
            seen |= {name: (image, label) for name, image, label in zip(block.names, pixels, block.labels, strict=True)}
        assert seen.keys() == {name.removeprefix("digits/") for name in contents}
        for name, (image, label) in seen.items():
            number = int(Path(name).stem)
            assert (image == digits.images[number] * 15).all()
            assert source.classes[label] == str(digits.target[number])
    assert len(source) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["digest"]  # nothing was extracted


def test_backslashes_and_leading_dots_are_understood(tmp_path: Path) -> None:
    png = digit_pngs(1).popitem()[1]
    path = write(tmp_path / "w", {"a\\1.png": png, "b\\1.png": png}, "zip")
    assert len(list(open_source("archive", {"w.zip": path}).blocks())) == 1
    path = write(tmp_path / "t", {"./a/1.png": png, "./b/1.png": png}, "tar")
    assert len(list(open_source("archive", {"t.tar": path}).blocks())) == 1


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ["../evil.png", "digits/1/../../../evil.png", "/etc/evil.png", "C:\\evil.png"])
def test_a_member_that_points_outside_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / "digest", digit_pngs() | {name: b"x"}, kind)
    with pytest.raises(InputError, match=r"evil\.png points outside the archive"):
        open_source("archive", {f"d.{kind}": path})


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_in_a_tar_is_refused(tmp_path: Path, type: bytes) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("digits/1/odd.png")
        info.type, info.linkname = type, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(InputError, match=r"odd\.png is a link or a device; pack .*-h --hard-dereference"):
        open_source("archive", {"d.tar": path})


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "zip")
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("digits/1/odd.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match=r"odd\.png is a link or a device"):
        open_source("archive", {"d.zip": path})


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_bomb_is_refused_before_any_image_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 2**20)
    path = write(tmp_path / "digest", digit_pngs() | {"digits/1/big.bmp": bytes(10 * 2**20)}, kind)
    with pytest.raises(InputError, match=r"big\.bmp makes it too large"):
        open_source("archive", {f"d.{kind}": path})
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_BYTES", 2**30)
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(InputError, match=r"big\.bmp makes it too large"):
        open_source("archive", {f"d.{kind}": path})


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "tar")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo(next(iter(digit_pngs()))))
    with pytest.raises(InputError, match="is there twice"):
        open_source("archive", {"d.tar": path})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_an_archive_that_is_cut_short_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = write(tmp_path / "digest", digit_pngs(), kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=rf"d\.{kind} is not a whole (zip|tar) archive"):
        open_source("archive", {f"d.{kind}": path})


@pytest.mark.parametrize("place", [1024, 1024 + 100, 1024 + 600])  # between members, in a header, in an image
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "tar")
    path.write_bytes(path.read_bytes()[:place])
    with pytest.raises(InputError, match=r"d\.tar is not a whole tar archive"):
        open_source("archive", {"d.tar": path})


def test_a_damaged_header_does_not_pass_for_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "tar")
    data = bytearray(path.read_bytes())
    data[10 * 1024 + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"d\.tar is not a whole tar archive"):
        open_source("archive", {"d.tar": path})


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        victim = archive.infolist()[5]
    place = victim.header_offset + 30 + len(victim.filename) + 20
    data[place] ^= 0xFF
    path.write_bytes(data)
    source = open_source("archive", {"d.zip": path})
    with pytest.raises(InputError, match=rf"d\.zip: member {victim.filename} is damaged"):
        list(source.blocks())


def test_an_empty_class_folder_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "digest", digit_pngs(), "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("digits/none")
    with pytest.raises(InputError, match="class folder none holds no"):
        open_source("archive", {"d.zip": path})


def test_something_else_than_an_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello" * 1000)
    with pytest.raises(InputError, match=r"x\.tar is not a whole tar archive"):
        open_source("archive", {"x.tar": tmp_path / "x"})
    (tmp_path / "x").write_bytes(b"PK\3\4" + b"hello" * 1000)
    with pytest.raises(InputError, match=r"x\.zip is not a whole zip archive"):
        open_source("archive", {"x.zip": tmp_path / "x"})


def test_a_tar_is_told_by_more_than_two_letters(tmp_path: Path) -> None:
    contents = {name.replace("digits/", "PK"): content for name, content in digit_pngs().items()}
    assert len(open_source("archive", {"d": write(tmp_path / "d", contents, "tar")})) == len(contents)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_a_folder_itself_has_the_words_of_the_folder(tmp_path: Path, kind: str) -> None:
    """They are part of the dataset version."""
    contents = digit_pngs() | {"digits/README.txt": b"x", "digits/0/broken.png": b"no image"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    files = {name.removeprefix("digits/"): tmp_path / name for name in sorted(contents)}
    sources = open_source("folder", files), open_source("archive", {"d": write(tmp_path / "d", contents, kind)})
    assert sources[0].left_out == sources[1].left_out
    assert "for example README.txt" in sources[0].left_out.remarks[0]
    first, second = (
        [image for block in each.blocks() for image in block.decode(block.labels >= 0, Target(8, 1)).unreadable]
        for each in sources
    )
    assert first == second and [image.name for image in first] == ["0/broken.png"]


def renamed(path: Path, names: dict[str, bytes]) -> Path:
    """The zip with other bytes of the same length in its names, and without a word about their encoding."""
    data = path.read_bytes()
    for name, raw in names.items():
        assert len(name) == len(raw)
        data = data.replace(name.encode(), raw)
    path.write_bytes(data)
    return path


def pair(first: str = "XXXXX", second: str = "YYYY") -> dict[str, bytes]:
    png = digit_pngs(1).popitem()[1]
    return {f"{first}/1.png": png, f"{second}/1.png": png}


def test_names_that_are_utf8_are_utf8_also_without_the_flag(tmp_path: Path) -> None:
    path = renamed(write(tmp_path / "m", pair(), "zip"), {"XXXXX": "café".encode(), "YYYY": "thé".encode()})
    assert open_source("archive", {"m.zip": path}).classes == ("café", "thé")
    path = write(tmp_path / "u", pair("café", "表示"), "zip")  # zipfile sets the flag
    assert open_source("archive", {"u.zip": path}).classes == ("café", "表示")


@pytest.mark.parametrize("names", [("表示", "ソ能", "cp932"), ("café", "thé", "cp850"), ("狗狗", "羊羊", "gb18030")])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_class_in_an_unknown_encoding_is_refused(tmp_path: Path, names: tuple[str, str, str], separator: str) -> None:
    first, second = (name.encode(names[2]) for name in names[:2])
    stand_ins = {"X" * len(first): first, "Y" * len(second): second}
    contents = {name.replace("/", separator): png for name, png in pair(*stand_ins).items()}
    path = renamed(write(tmp_path / "m", contents, "zip"), stand_ins)
    with pytest.raises(InputError, match=r"m\.zip: the name of member .* is not UTF-8, so its class is unknown"):
        open_source("archive", {"m.zip": path})
    with tarfile.open(tmp_path / "t", "w") as archive:
        archive.addfile(tarfile.TarInfo(first.decode(errors="surrogateescape") + "/1.png"))
    with pytest.raises(InputError, match=r"t\.tar: the name of member .* is not UTF-8"):
        open_source("archive", {"t.tar": tmp_path / "t"})


def test_a_byte_of_a_character_is_no_separator(tmp_path: Path) -> None:
    contents = {name.replace("1.png", "XX.png"): png for name, png in pair("AAAA", "BBBB").items()}
    path = renamed(write(tmp_path / "m", contents, "zip"), {"XX": "表".encode("cp932")})  # 0x95 0x5C
    source = open_source("archive", {"m.zip": path})
    assert source.classes == ("AAAA", "BBBB")
    (block,) = source.blocks()
    assert [name.rpartition("/")[2] for name in block.names] == ["\\x95\\.png"] * 2


def test_folders_written_with_a_backslash_are_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "w", {name.replace("/", "\\"): png for name, png in pair("a", "b").items()}, "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a\\", b"")
    source = open_source("archive", {"w.zip": path})
    assert (source.classes, source.left_out.remarks) == (("a", "b"), ())


def test_a_method_that_is_not_understood_is_said_to_be_that(tmp_path: Path) -> None:
    path = write(tmp_path / "w", pair(), "zip")
    data = bytearray(path.read_bytes())
    data[8] = 9
    data[data.index(b"PK\1\2") + 10] = 9
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"1\.png is compressed by method 9 .*pack it again with another program"):
        open_source("archive", {"w.zip": path})


def test_a_zip_that_unpacks_itself_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w", pair("a", "b"), "zip")
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
    assert len(list(open_source("archive", {"w.zip": path}).blocks())) == 1


def test_images_of_a_tar_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    contents = digit_pngs()
    path = write(tmp_path / "t", dict(sorted(contents.items(), reverse=True)), "tar.gz")
    source = open_source("archive", {"t.tar.gz": path})
    for _ in range(2):
        found = {
            name: content for block in source.blocks() for name, content in zip(block.names, block.files, strict=True)
        }
        wanted = {name.removeprefix("digits/"): content for name, content in sorted(contents.items())}
        assert found == wanted and list(found) == list(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("many", [1, 3000])
def test_headers_of_a_tar_do_not_fill_the_memory(tmp_path: Path, kind: bytes, many: int) -> None:
    size = 64 * 2**20 if many == 1 else 1000
    with gzip.open(tmp_path / "t", "wb", compresslevel=1) as file:
        for _ in range(many):
            info = tarfile.TarInfo("long")
            info.type, info.size = kind, size
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + bytes(size + -size % 512))
        file.write(bytes(1024))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"t\.tar\.gz: it has more than 1,048,576 bytes of headers"):
        open_source("archive", {"t.tar.gz": tmp_path / "t"})
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t", "w") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(info)
    with pytest.raises(InputError, match="sparse file; pack it again without --sparse"):
        open_source("archive", {"t.tar": tmp_path / "t"})
