"""Real images in any number: crops of photographs, and Fashion-MNIST shifted by some pixels."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from cnn.formats.idx import IdxImages
from tests.bench.data import CLASSES

Block = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, C, H, W] and labels [n]."""

SIDE = 224
SMALLEST = 160  # pixels of the photograph that a crop shows, at least
CHUNK = 500  # crops at a time
SHIFTS = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]


def photographs(count: int) -> Iterator[Block]:
    """Crops of the three photographs that scikit-learn and matplotlib bring: each of another place, size or side."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photos.append(Image.open(file).convert("RGB"))
    random = np.random.default_rng(0)

    def crop(draw: NDArray[np.float64], photo: Image.Image) -> NDArray[np.uint8]:
        width, height = photo.size
        side = SMALLEST + draw[0] * (min(photo.size) - SMALLEST)
        left, upper = draw[1] * (width - side), draw[2] * (height - side)
        box = (left, upper, left + side, upper + side)
        pixels = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        return (pixels[:, ::-1] if draw[3] < 0.5 else pixels).transpose(2, 0, 1)

    with ThreadPoolExecutor() as threads:
        for start in range(0, count, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, count))
            chosen = [photos[number % len(photos)] for number in numbers]
            yield np.stack(list(threads.map(crop, random.random((len(numbers), 4)), chosen))), numbers % CLASSES


def fashion(count: int, files: Mapping[str, Path]) -> Iterator[Block]:
    """Fashion-MNIST again and again, each time shifted in another way (up to 1 750 000 images differ)."""
    left = count
    for shift in SHIFTS[len(SHIFTS) // 2 :] + SHIFTS:
        for block in IdxImages(files).blocks():
            if not left:
                return
            images, labels = block.images[:left], block.labels[:left]
            yield np.roll(images, shift, axis=(2, 3)), labels
            left -= len(images)
