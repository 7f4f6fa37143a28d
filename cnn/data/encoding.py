"""Compresses packed images, and decodes them as readers will.

Compression loses details once, here: the manifest's mean and standard deviation are computed from the pixels that
`decode` returns, which equal those that readers get from torchvision's decoders.
"""

from collections.abc import Iterable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cnn.config.preprocessing import Encoding
from cnn.errors import InputError


def check_encoding(encoding: Encoding, channels: int) -> None:
    """Raises InputError if an encoding cannot store images with this number of channels."""
    if encoding == "webp" and channels == 1:  # would be decoded as colour
        raise InputError("data.encoding webp is for colour images, and these are grey; use jpeg, or data.channels 3")


def encode(images: Iterable[NDArray[np.uint8]], encoding: Encoding, quality: int) -> list[bytes]:
    """Returns each image [C, H, W] as a compressed file.

    Args:
        quality: 1..100, as defined by Pillow.
    """
    return [_encode(image, encoding, quality) for image in images]


def decode(data: bytes) -> NDArray[np.uint8]:
    """Returns the pixels [C, H, W] of a file that `encode` made."""
    with Image.open(BytesIO(data)) as image:
        pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _encode(image: NDArray[np.uint8], encoding: Encoding, quality: int) -> bytes:
    plane = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    file = BytesIO()
    Image.fromarray(plane).save(file, encoding, quality=quality)
    return file.getvalue()
