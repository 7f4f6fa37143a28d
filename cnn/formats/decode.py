"""Decodes image files, and converts them to one size and mode."""

import re
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from cnn.config.preprocessing import Resize
from cnn.formats.image_metadata import pixels_only

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Pillow's names of the supported formats, which are recognised by content, not by file name."""

MAX_PIXELS = 64_000_000
"""Larger images are refused: a file of a few kilobytes can claim to contain gigapixels."""

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are refused: a film with an image's name would fill the memory."""

_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by EXIF orientation (Exif 2.32, tag 274)."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_TOO_LARGE = b"not read because of its size in bytes: "

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I")


class ImageHeader(NamedTuple):
    """The properties of an image that its header contains."""

    width: int
    height: int
    mode: str
    grey: bool


class Target(NamedTuple):
    """Size and channels of all packed images, and how rectangles become squares."""

    image_size: int
    channels: int
    resize: Resize = "crop"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def mode(self) -> str:
        """Pillow's name of the mode."""
        return "L" if self.channels == 1 else "RGB"


def stand_in(size: int) -> bytes:
    """Returns what stands for the content of a file that is too large to be read; decoding it raises ValueError."""
    return _TOO_LARGE + str(size).encode()


def check_size(size: int) -> None:
    """Raises ValueError if an image file has more than `MAX_FILE_BYTES`."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes is more than {MAX_FILE_BYTES:,}")


def read_header(data: bytes) -> ImageHeader:
    """Reads an image's header, without decoding pixels. On damaged data raises Pillow's errors, which may be any."""

    def read(data: bytes) -> ImageHeader:
        with _open(data) as image:
            return ImageHeader(image.width, image.height, image.mode, _is_grey(image))

    return _despite_metadata(read, data)


def decode_image(data: bytes, target: Target) -> NDArray[np.uint8]:
    """Returns the pixels [C, H, W] of an encoded image. On damaged data raises Pillow's errors, which may be any.

    EXIF orientation is applied if it is readable. Transparent parts become white. 16-bit grey keeps its upper 8 bits.
    Then `fit` converts mode and size.
    """

    def decode(data: bytes) -> NDArray[np.uint8]:
        with _open(data) as image:
            # A JPEG is decoded faster at 1/2, 1/4 or 1/8 of its size; twice the target size is enough for filtering.
            # The shorter side decides, whatever `target.resize` is, so that examples for users need one line.
            image.draft(None, (2 * target.image_size, 2 * target.image_size))
            return fit(_opaque(_upright(image)), target)

    return _despite_metadata(decode, data)


def fit(image: Image.Image, target: Target) -> NDArray[np.uint8]:
    """Returns pixels [C, H, W]: the image made square as `target.resize` says (bilinear, antialiased)."""
    side = target.image_size
    square = _SQUARES[target.resize](image.convert(target.mode), side)
    pixels: NDArray[np.uint8] = np.asarray(square).reshape(side, side, target.channels)
    return pixels.transpose(2, 0, 1)


def reason_of(error: Exception) -> str:
    """Says why an image could not be read, in a few words that are equal on every machine."""
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG, WebP or BMP image"
    words = re.sub(r"<[^>]*>", "", str(error)).strip()  # without addresses of objects
    return words[:120] or type(error).__name__


def decoder_versions() -> dict[str, str]:
    """Returns the versions of the libraries that decode images: another version may give other pixels."""
    found = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "jpg", "webp", "zlib")}
    return {name: version for name, version in found.items() if version}


def _despite_metadata(read: Callable[[bytes], T], data: bytes) -> T:
    """Reads an image; if that fails, reads it again without its metadata, which do not affect pixels."""
    try:
        return read(data)
    except Exception:
        if (bare := pixels_only(data)) != data:
            with suppress(Exception):
                return read(bare)
        raise


def _open(data: bytes) -> Image.Image:
    if data.startswith(_LFS_POINTER):
        raise ValueError("a Git LFS pointer in place of the image; run git lfs pull")
    if data.startswith(_TOO_LARGE):
        check_size(int(data.removeprefix(_TOO_LARGE)))
    image = Image.open(BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} by {image.height} pixels is more than {MAX_PIXELS:,}")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image turned upright by its metadata; as it is stored if they cannot be read."""
    image.load()  # some metadata follow the pixels
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _crop(image: Image.Image, side: int) -> Image.Image:
    """Returns the centre square."""
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


def _pad(image: Image.Image, side: int) -> Image.Image:
    """Returns the whole image in the middle of a square of its mean colour.

    The mean adds no contrast, so the data gate still finds blank images; black would hide them.
    """
    longer = max(image.size)
    width, height = (max(1, round(length / longer * side)) for length in image.size)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    square = Image.new(image.mode, (side, side), whole.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    square.paste(whole, (round((side - width) / 2), round((side - height) / 2)))
    return square


def _squash(image: Image.Image, side: int) -> Image.Image:
    """Returns the whole image, with both sides scaled."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


_SQUARES: dict[Resize, Callable[[Image.Image, int], Image.Image]] = {"crop": _crop, "pad": _pad, "squash": _squash}


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", *_WIDE_MODES)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_MODES:
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image
