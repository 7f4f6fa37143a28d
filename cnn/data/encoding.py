"""Packed images as compressed files, each of the manifest's size and channels.

What is lost is lost here, once: the manifest's mean and standard deviation are of the pixels that `decode` gives,
which are those that torchvision's decoders give a reader.
"""

from collections.abc import Iterable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cnn.config.preprocessing import Encoding
from cnn.errors import InputError


def check_encoding(encoding: Encoding, channels: int) -> None:
    """Raise InputError if images of so many channels cannot be stored like that."""
    if encoding == "webp" and channels == 1:  # it would come back in colour
        raise InputError("data.encoding webp is for colour images, and these are grey; use jpeg, or data.channels 3")


def encode(images: Iterable[NDArray[np.uint8]], encoding: Encoding, quality: int) -> list[bytes]:
    """Each image [C, H, W] as a file of its own.

    Args:
        quality: 1..100, as Pillow takes it.
    """
    return [_encode(image, encoding, quality) for image in images]


def decode(data: bytes) -> NDArray[np.uint8]:
    """Pixels [C, H, W] of a file that `encode` made."""
    with Image.open(BytesIO(data)) as image:
        pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _encode(image: NDArray[np.uint8], encoding: Encoding, quality: int) -> bytes:
    plane = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    file = BytesIO()
    Image.fromarray(plane).save(file, encoding, quality=quality)
    return file.getvalue()
