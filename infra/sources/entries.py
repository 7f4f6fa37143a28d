"""The catalogue of data sets: their files, the digests that verify them, and their mirrors."""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.errors import UsageError
from infra.records import Record

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA = "metadata.csv"
"""The table beside class folders, which adds columns to their images. As a data set, it has its folder's name."""

WHAT_TO_GIVE = "give a folder, a label table, an archive, an s3:// or https:// address"

Format = Literal["idx", "cifar", "digits", "folder", "archive"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class CatalogueFile(Record, extra="forbid"):
    """One published file. A `.gz` file is stored unpacked: mirrors compress differently, but the content is equal."""

    name: str
    """Its name as published."""

    size: int
    """Bytes of the content; of a `.gz` file, unpacked."""

    sha256: Sha256 | None = None
    """SHA-256 of the content."""

    md5: Md5 | None = None
    """MD5 of the file as published, where its publisher states only that."""

    @model_validator(mode="after")
    def _verifiable(self) -> "CatalogueFile":
        if not self.sha256 and not self.md5:
            raise ValueError(f"{self.name} has neither a SHA-256 nor an MD5")
        return self

    @property
    def packed(self) -> bool:
        """Whether the file is published compressed and stored uncompressed."""
        return self.name.endswith(".gz") and not self.name.endswith(".tar.gz")

    @property
    def path(self) -> str:
        """Its path in the raw source."""
        return self.name.removesuffix(".gz") if self.packed else self.name


class CatalogueEntry(Record, extra="forbid"):
    """A data set of the catalogue."""

    name: str
    format: Format
    homepage: str
    licence: str
    citation: str
    image_size: int | None = None
    """Height and width of its images, in pixels; None if they are not known before the images are read."""

    channels: int | None = None
    """Of its images: 1 or 3; None if they are not known before the images are read."""

    test_images: int | None = None
    """Images of its test split; None if Convoy splits it."""

    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty if the files name them, or if the labels serve as names."""

    handed: bool = False
    """Whether a mirrored image has another meaning or none, as with digits and letters."""

    files: tuple[CatalogueFile, ...]
    mirrors: tuple[str, ...]
    """Base addresses, tried in order; a slash and the file's name follow. Schemes: `infra.sources.mirrors`."""

    @property
    def digest(self) -> str:
        """SHA-256 of format, classes and files, independent of the mirrors."""
        content = self.model_dump_json(include={"format", "classes", "files"})
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def _mnist_like(**digests: tuple[str | None, str | None]) -> tuple[CatalogueFile, ...]:
    """Returns the four files of MNIST and its successors: 60 000 and 10 000 images of 28 x 28, and their labels.

    Args:
        digests: part → SHA-256 of the content, MD5 of the file as published.
    """
    sizes = {"train_images": 47040016, "train_labels": 60008, "t10k_images": 7840016, "t10k_labels": 10008}
    return tuple(
        CatalogueFile(
            name=f"{part.replace('_', '-')}-idx{3 if part.endswith('images') else 1}-ubyte.gz",
            size=size,
            sha256=digests[part][0],
            md5=digests[part][1],
        )
        for part, size in sizes.items()
    )


GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        name="fashion-mnist",
        format="idx",
        image_size=28,
        channels=1,
        test_images=10_000,
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        licence="MIT",
        citation="Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking "
        "Machine Learning Algorithms, arXiv:1708.07747",
        classes=GARMENTS,
        files=_mnist_like(
            train_images=("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", None),
            train_labels=("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", None),
            t10k_images=("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", None),
            t10k_labels=("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", None),
        ),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "deb:dataset-fashion-mnist/usr/share/datasets/fashion-mnist",
            "file:/usr/share/datasets/fashion-mnist",
        ),
    ),
    CatalogueEntry(
        name="mnist",
        format="idx",
        image_size=28,
        channels=1,
        test_images=10_000,
        handed=True,
        homepage="http://yann.lecun.com/exdb/mnist/",
        licence="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, "
        "Proceedings of the IEEE 86(11), 1998",
        files=_mnist_like(
            train_images=(None, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            train_labels=(None, "d53e105ee54ea40749a09fcbcd1e9432"),
            t10k_images=(None, "9fb629c4189551a2d022fa330f9573f3"),
            t10k_labels=(None, "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
    ),
    CatalogueEntry(
        name="kmnist",
        format="idx",
        image_size=28,
        channels=1,
        test_images=10_000,
        handed=True,
        homepage="http://codh.rois.ac.jp/kmnist/",
        licence="CC BY-SA 4.0",
        citation="Clanuwat, Bober-Irizar, Kitamoto, Lamb, Yamamoto, Ha: Deep Learning for Classical "
        "Japanese Literature, arXiv:1812.01718",
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        files=_mnist_like(
            train_images=(None, "bdb82020997e1d708af4cf47b453dcf7"),
            train_labels=(None, "e144d726b3acfaa3e44228e80efcd344"),
            t10k_images=(None, "5c965bf0a639b31b8f53240b1b52f4d7"),
            t10k_labels=(None, "7320c461ea6c1c855c0b718fb2a4b134"),
        ),
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist",),
    ),
    CatalogueEntry(
        name="cifar10",
        format="cifar",
        image_size=32,
        channels=3,
        test_images=10_000,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; its author asks for the citation",
        citation="Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
        files=(CatalogueFile(name="cifar-10-binary.tar.gz", size=170052171, md5="c32a1d4ab5d03f1284b67883e8d87530"),),
        mirrors=("https://www.cs.toronto.edu/~kriz",),
    ),
    CatalogueEntry(
        name="cifar100",
        format="cifar",
        image_size=32,
        channels=3,
        test_images=10_000,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; its author asks for the citation",
        citation="Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
        files=(CatalogueFile(name="cifar-100-binary.tar.gz", size=168513733, md5="03b5dce01913d631647c71ecec9e9cb8"),),
        mirrors=("https://www.cs.toronto.edu/~kriz",),
    ),
    CatalogueEntry(
        name="digits",
        format="digits",
        image_size=8,
        channels=1,
        handed=True,
        homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        licence="CC BY 4.0",
        citation="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998",
        files=(
            CatalogueFile(
                name="digits.csv.gz",
                size=264712,
                sha256="6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8",
            ),
        ),
        mirrors=("package:sklearn/datasets/data",),
    ),
)


def is_archive(name: str) -> bool:
    """Returns whether a file's name is that of an archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def is_table(name: str) -> bool:
    """Returns whether a file's name is that of a label table."""
    return name.lower().endswith(TABLE_SUFFIXES)


def stem(name: str) -> str:
    """Returns the name of an archive or of a label table without its suffix."""
    suffix = next((each for each in (*ARCHIVE_SUFFIXES, *TABLE_SUFFIXES) if name.lower().endswith(each)), "")
    return name[: len(name) - len(suffix)]


def catalogued(dataset: str) -> CatalogueEntry | None:
    """Returns the entry of the catalogue with this name."""
    return next((entry for entry in CATALOGUE if entry.name == dataset), None)


def check_dataset(dataset: str) -> None:
    """Raises UsageError if `dataset` is no catalogue name, address or existing path; contacts no server."""
    path = os.path.expanduser(dataset.removeprefix("file:"))
    if not catalogued(dataset) and "://" not in dataset and not os.path.exists(path):
        raise no_such_dataset(dataset)


def no_such_dataset(dataset: str) -> UsageError:
    """Returns the error for a name that names nothing; it suggests the name that was probably meant."""
    if len(Path(dataset).parts) > 1 or dataset.startswith((".", "~", "/")) or is_archive(dataset) or is_table(dataset):
        return UsageError(f"{dataset}: there is no such folder, label table or archive")
    names = [entry.name for entry in CATALOGUE]
    folders = [path.name for path in Path().glob("[!.]*/")]
    near = difflib.get_close_matches(dataset, folders, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(dataset.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)};"
    return UsageError(f"unknown data set {dataset!r}: {hint} or {WHAT_TO_GIVE}")
