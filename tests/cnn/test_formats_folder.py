"""Folders of image files: which are taken, what class and split they have, and how each kind is decoded."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_digits

from cnn.config.preprocessing import Resize
from cnn.data.splits import TEST, TRAIN, UNDECIDED, VAL
from cnn.errors import InputError
from cnn.formats import open_source
from cnn.formats.block import Decoded, FileBlock
from cnn.formats.decode import MAX_PIXELS, Target, decode_image, read_header
from cnn.formats.image_metadata import pixels_only
from cnn.formats.layout import Layout, arrange

GREY = np.round(load_digits().images[7] * 255 / 16).astype(np.uint8).repeat(4, 0).repeat(4, 1)  # 32 x 32
COLOUR = np.stack([GREY, 255 - GREY, GREY.T], axis=2)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes, channels: int = 3, size: int = 32) -> np.ndarray:
    return decode_image(data, Target(size, channels)).transpose(1, 2, 0)


def arranged(paths: list[str], folders: list[str] | None = None) -> tuple[Layout, list[str]]:
    """The layout, and the images' paths in its order."""
    layout = arrange(sorted(paths), folders or [])
    return layout, [sorted(paths)[position] for position in layout.chosen]


# --- paths ----------------------------------------------------------------------------------------


def test_class_folders_become_sorted_classes() -> None:
    layout, names = arranged(["dog/1.png", "cat/a/deep/2.JPG", "cat/1.webp", "bird/x.bmp"])
    assert layout.classes == ("bird", "cat", "dog")
    assert names == ["bird/x.bmp", "cat/1.webp", "cat/a/deep/2.JPG", "dog/1.png"]
    assert layout.labels.tolist() == [0, 1, 1, 2]
    assert layout.splits.tolist() == [UNDECIDED] * 4


def test_split_folders_are_kept_under_their_usual_names() -> None:
    layout, names = arranged(["train/a/1.png", "train/b/1.png", "Validation/a/1.png", "test/b/1.png"])
    assert layout.classes == ("a", "b")
    assert dict(zip(names, layout.splits.tolist(), strict=True)) == {
        "train/a/1.png": TRAIN,
        "train/b/1.png": TRAIN,
        "Validation/a/1.png": VAL,
        "test/b/1.png": TEST,
    }


def test_wrapping_folders_are_looked_through() -> None:
    layout, _ = arranged(["pets/images/cat/1.png", "pets/images/dog/1.png", "pets/README.md"])
    assert layout.classes == ("cat", "dog")
    layout, _ = arranged(["pets/train/cat/1.png", "pets/train/dog/1.png", "pets/test/dog/2.png"])
    assert (layout.classes, layout.splits.tolist()) == (("cat", "dog"), [TEST, TRAIN, TRAIN])


def test_hidden_files_are_skipped_and_other_files_remarked_on() -> None:
    layout, names = arranged(["a/1.png", "b/1.png", "a/._1.png", "__MACOSX/a/1.png", ".git/x.png", "b/notes.txt"])
    assert names == ["a/1.png", "b/1.png"]
    (remark,) = layout.left_out.remarks
    assert "1 files" in remark and "b/notes.txt" in remark


@pytest.mark.parametrize(
    ("paths", "folders", "complaint"),
    [
        ([], [], "no PNG, JPEG, WebP or BMP image found among 0 files"),
        (["a/x.gif", "b.zip"], [], "no PNG, JPEG, WebP or BMP image found among 2 files, for example a/x.gif"),
        (["a/1.png", "a/2.png"], [], "only one class, a;"),
        (["a/1.png", "b/1.png", "c/notes.txt"], [], "class folder c holds no PNG"),
        (["a/1.png", "b/1.png"], ["c"], "class folder c holds no PNG"),
        (["x/a/1.png", "x/b/1.png"], ["x", "x/a", "x/c"], "class folder c holds no PNG"),
        (["a/1.png", "b/1.png", "stray.png"], [], "stray.png is outside of all class folders"),
        (
            ["train/1.png", "train/a/1.png", "test/b/1.png"],
            [],
            "train/1.png is outside .* train/CLASS/IMAGE",
        ),
        (["test/a/1.png", "val/b/1.png"], [], "folders test, val but none called train"),
    ],
)
def test_collections_that_cannot_be_learnt_from_are_refused(
    paths: list[str], folders: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        arranged(paths, folders)


def test_an_empty_class_folder_can_be_named_to_the_source(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(encoded(Image.fromarray(GREY)))
    files = {"a/1.png": tmp_path / "1", "b/1.png": tmp_path / "1", "c/": tmp_path}
    with pytest.raises(InputError, match="class folder c holds no"):
        open_source("folder", files)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    assert (decoded(encoded(Image.fromarray(COLOUR), format, **options)) == COLOUR).all()


def test_jpeg_gives_nearly_the_pixels() -> None:
    smooth = np.asarray(Image.fromarray(GREY).resize((128, 128), Image.Resampling.BICUBIC))
    given = decoded(encoded(Image.fromarray(smooth), "JPEG", quality=95), channels=1, size=32)[..., 0]
    wanted = np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(given.astype(int) - wanted).mean() < 3  # though it was decoded at half its size


def test_the_format_is_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(GREY), "WEBP", lossless=True))
    (block,) = open_source("folder", {"a/1.jpg": tmp_path / "x", "b/2.png": tmp_path / "x"}).blocks()
    assert (block.decode(np.array([True, True]), Target(32, 1)).images[:, 0] == GREY).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes_convert_to_grey_and_colour(mode: str) -> None:
    image = Image.fromarray(COLOUR if mode in ("P", "RGB") else GREY).convert(mode)
    data = encoded(image)
    assert (decoded(data, channels=3) == np.asarray(image.convert("RGB"))).all()
    assert (decoded(data, channels=1)[..., 0] == np.asarray(image.convert("RGB").convert("L"))).all()


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    pixels = decoded(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [200, 30, 60]).max() < 8


def test_sixteen_bit_grey_keeps_its_upper_bits() -> None:
    deep = GREY.astype(np.uint16) * 256 + 99
    data = encoded(Image.fromarray(deep))
    assert read_header(data).mode == "I;16"
    assert read_header(data).grey
    assert (decoded(data, channels=1)[..., 0] == GREY).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_parts_show_white(mode: str) -> None:
    if mode == "P":
        image = Image.fromarray(GREY // 128, "P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        data = encoded(image, transparency=0)
        transparent = GREY // 128 == 0
    else:
        image = Image.fromarray(COLOUR).convert(mode)
        transparent = GREY > 100
        image.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
        data = encoded(image)
    pixels = decoded(data)
    assert (pixels[transparent] == 255).all()
    assert (pixels[~transparent] == np.asarray(image.convert("RGB"))[~transparent]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(Image.fromarray(COLOUR), format, exif=exif, **options)
    upright = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.swapaxes(0, 1),
        6: np.rot90(COLOUR, -1),
        7: COLOUR[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(COLOUR, 1),
    }
    assert (decoded(data) == upright[orientation]).all()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (40, 50), (9, 8)])
def test_the_shorter_side_is_resized_and_the_centre_kept(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    scale = 8 / min(image.size)
    whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 8) // 2, (whole.height - 8) // 2
    centre = np.asarray(whole.crop((left, top, left + 8, top + 8)))
    assert np.abs(decoded(encoded(image), size=8).astype(int) - centre).max() <= 1


def square_of(image: np.ndarray, size: int, resize: Resize) -> list[list[int]]:
    """The grey image, made square from a file."""
    return decode_image(encoded(Image.fromarray(image)), Target(size, 1, resize))[0].tolist()


def test_a_rectangle_becomes_a_square_in_one_of_three_ways() -> None:
    wide = np.array([[10, 20, 30, 40], [50, 60, 70, 80]], dtype=np.uint8)
    assert square_of(wide, 2, "crop") == [[20, 30], [60, 70]]
    # Shrinking by two weighs three neighbours with 3, 3, 1: (3 * 10 + 3 * 20 + 30) / 7 = 17.1
    assert square_of(wide, 2, "squash") == [[17, 33], [57, 73]]
    assert square_of(wide, 4, "pad") == [[45] * 4, *wide.tolist(), [45] * 4]
    tall = wide.T.copy()
    assert square_of(tall, 2, "crop") == [[20, 60], [30, 70]]
    assert square_of(tall, 2, "squash") == [[17, 57], [33, 73]]
    assert square_of(tall, 4, "pad") == [[45, *row, 45] for row in tall.tolist()]


def test_padding_has_the_image_s_mean_colour() -> None:
    colours = np.empty((2, 4, 3), dtype=np.uint8)
    colours[:, :2], colours[:, 2:] = (10, 100, 200), (30, 120, 0)
    pixels = decode_image(encoded(Image.fromarray(colours)), Target(4, 3, "pad")).transpose(1, 2, 0)
    assert (pixels[[0, 3]] == [20, 110, 100]).all() and (pixels[1:3] == colours).all()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (40, 50), (9, 8), (33, 32), (3, 100)])
@pytest.mark.parametrize("side", [32, 300])
def test_an_image_is_padded_as_pillow_pads_it(shape: tuple[int, int], side: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    size = (side, side)
    whole = ImageOps.contain(image, size, Image.Resampling.BILINEAR)
    mean = whole.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    wanted = np.asarray(ImageOps.pad(image, size, Image.Resampling.BILINEAR, color=mean))
    found = decode_image(encoded(image), Target(side, 3, "pad")).transpose(1, 2, 0)
    assert (found == wanted).all()
    assert np.abs(np.asarray(whole).mean((0, 1)) - mean).max() < 1


def test_a_line_keeps_a_pixel_when_it_is_padded() -> None:
    line = np.full((1, 1000), 200, dtype=np.uint8)
    for image in (line, line.T.copy()):
        assert np.unique(square_of(image, 8, "pad")).tolist() == [200]


@pytest.mark.parametrize("resize", ["pad", "squash"])
@pytest.mark.parametrize("size", [8, 32, 45])
def test_all_ways_agree_on_squares(resize: Resize, size: int) -> None:
    data = encoded(Image.fromarray(COLOUR))
    assert (decode_image(data, Target(size, 3, resize)) == decode_image(data, Target(size, 3))).all()


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decoded(encoded(Image.fromarray(checks)), channels=1, size=16)
    assert np.abs(small.astype(int) - 127)[2:-2, 2:-2].max() <= 2


def test_grey_is_recognised_in_every_mode() -> None:
    grey_palette = Image.fromarray(GREY // 16, "P")
    grey_palette.putpalette([level for value in range(16) for level in [value * 17] * 3])
    greys = [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("1"),
        Image.fromarray(GREY).convert("LA"),
        grey_palette,
    ]
    assert all(read_header(encoded(image)).grey for image in greys)
    colours = [
        Image.fromarray(COLOUR),
        Image.fromarray(COLOUR).convert("P"),
        Image.fromarray(GREY).convert("RGB"),
    ]
    assert not any(read_header(encoded(image)).grey for image in colours)


# --- damage ---------------------------------------------------------------------------------------


def decode_all(*contents: bytes) -> Decoded:
    names = tuple(f"a/{number}.png" for number in range(len(contents)))
    block = FileBlock(
        names=names,
        files=contents,
        labels=np.zeros(len(contents), dtype=np.int64),
        splits=np.zeros(len(contents), dtype=np.int8),
    )
    block.survey()
    return block.decode(np.ones(len(contents), dtype=np.bool_), Target(8, 1))


def test_unreadable_images_are_named_and_the_others_kept() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    damaged = [encoded(Image.fromarray(photo), format) for format in ("PNG", "JPEG", "WEBP", "BMP")]
    good = encoded(Image.fromarray(GREY))
    result = decode_all(*(data[: len(data) // 2] for data in damaged), b"", b"GIF89a" + bytes(100), good)
    assert [image.name for image in result.unreadable] == [f"a/{number}.png" for number in range(6)]
    assert result.positions.tolist() == [6]
    assert len(result.images) == 1
    assert result.unreadable[5].reason == "not a PNG, JPEG, WebP or BMP image"


def test_flipped_bits_never_raise_and_reasons_name_no_addresses() -> None:
    random = np.random.default_rng(1)
    original = np.frombuffer(encoded(Image.fromarray(COLOUR)), dtype=np.uint8)
    reasons = set()
    for _ in range(200):
        data = original.copy()
        data[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        reasons |= {image.reason for image in decode_all(data.tobytes()).unreadable}
    assert reasons
    assert not any("0x" in reason or "\n" in reason for reason in reasons)


def test_a_decompression_bomb_is_not_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 100
    bomb = encoded(Image.new("1", (side, side)), optimize=True)
    assert len(bomb) < 100_000
    (refused,) = decode_all(bomb).unreadable
    assert "more than 64,000,000" in refused.reason


# --- metadata -------------------------------------------------------------------------------------

RUBBISH = b"garbage" * 9
LONG = b"x" * (2 * 2**20)


def exif(*entries: tuple[int, int, int, bytes], behind: bytes = b"") -> bytes:
    """Little-endian EXIF: tag, type, count and four bytes of each entry."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + behind


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    found = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", found)


def png_with(*chunks: bytes, behind: bytes = b"") -> bytes:
    data = encoded(Image.fromarray(COLOUR))
    return data[:33] + b"".join(chunks) + data[33:-12] + behind + data[-12:]


SIX = (0x112, 3, 1, struct.pack("<HH", 6, 0))

TOLD = {
    "XResolution -1/0": exif(SIX, (0x11A, 10, 1, struct.pack("<I", 38)), behind=struct.pack("<ii", -1, 0)),
    "ImageWidth -5": exif(SIX, (0x100, 9, 1, struct.pack("<i", -5))),
    "a sub-directory beyond the end": exif(SIX, (0x8769, 4, 1, struct.pack("<I", 2**31))),
}


@pytest.mark.parametrize("told", TOLD)
def test_orientation_is_known_whatever_else_the_exif_says(told: str) -> None:
    smooth = Image.linear_gradient("L").resize((64, 32))
    plain = decoded(encoded(smooth, "JPEG"), 1, 16)[..., 0]
    turned = decoded(encoded(smooth, "JPEG", exif=TOLD[told]), 1, 16)[..., 0]
    assert (turned == np.rot90(plain, -1)).all()
    png = encoded(smooth, "PNG", exif=TOLD[told])
    assert np.abs(decoded(png, 1, 16)[..., 0].astype(int) - turned).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_pillow_turns_it(orientation: int) -> None:
    image = Image.fromarray(COLOUR)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "PNG", exif=image.getexif())
    with Image.open(io.BytesIO(data)) as opened:
        assert (decoded(data) == np.asarray(ImageOps.exif_transpose(opened))).all()


SPOILT = {
    "eXIf of rubbish": png_with(chunk(b"eXIf", RUBBISH)),
    "eXIf of rubbish behind the pixels": png_with(behind=chunk(b"eXIf", RUBBISH)),
    "tEXt that is no hex": png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nno hex at all\n")),
    "zTXt of 2 MB": png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))),
    "zTXt of 2 MB behind the pixels": png_with(behind=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))),
    "iCCP of 2 MB": png_with(chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG))),
    "iTXt of 2 MB": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG))),
    "tEXt with a wrong sum": png_with(chunk(b"tEXt", b"Comment\0hello", crc=1)),
    "pHYs that is too short": png_with(chunk(b"pHYs", b"12")),
    "WebP with EXIF of rubbish": encoded(Image.fromarray(COLOUR), "WEBP", lossless=True, exif=RUBBISH, xmp=RUBBISH),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_metadata_never_make_pixels_unreadable(spoilt: str) -> None:
    assert (decoded(SPOILT[spoilt]) == COLOUR).all()
    assert (read_header(SPOILT[spoilt]).width, read_header(SPOILT[spoilt]).grey) == (32, False)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_without_metadata_the_pixels_stay(format: str) -> None:
    data = encoded(Image.fromarray(COLOUR), format)
    assert (decoded(pixels_only(data)) == decoded(data)).all()
    rich = encoded(Image.fromarray(COLOUR), format, exif=exif(SIX), xmp=b"<x/>", icc_profile=RUBBISH)
    assert not any(told in pixels_only(rich) for told in (b"<x/>", b"garbage", b"II*\0"))
    assert (decoded(pixels_only(rich)) == decoded(data)).all()
