"""Draws the page of images whose label is probably wrong, for a person to look through."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from cnn.data.splits import SPLITS, Split
from infra.records import Record
from tasks.reporting.html import document, rendered, webp
from tasks.reporting.markdown import plain, table

if TYPE_CHECKING:
    from cnn.data.split_reader import SplitReader

SHOWN, SHOWN_PAIRS = 100, 10
PIXELATED_BELOW = 96  # pixels: smaller images are shown as squares of one colour, not smoothed

STYLE = """
.suspects { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem }
.suspects figure { margin: 0; font-size: .875rem; line-height: 1.375 } .suspects b { font-weight: 600 }
.suspects figcaption { overflow-wrap: anywhere } .suspects img { width: 100% } .pixels { image-rendering: pixelated }
"""

METHOD = """An image is listed if the model is at least as sure of another class as it is, on average, of the images
that are labelled so, and finds another class more probable than the label (confident learning: Northcutt, Jiang and
Chuang, 2021). Images are ranked by score: 1 means that the model is certain of the suggested label, 0.5 that it is
undecided. The model can be wrong: look at each image before you change its label."""

SEEN = """**The training images were seen in training**, with these labels, so the model may have learnt wrong labels by
heart: the longer it was trained, the fewer of them it finds there. The validation and test images were not seen. To
have others judged so, train once more with another `data.split_seed` under another `--name`."""

UNNAMED = """This dataset version has no file names, so images are named by split and position, counted from 0."""


class Suspect(NamedTuple):
    """An image whose label is probably wrong."""

    split: Split
    position: int
    """In its split."""

    path: str
    """As in the image index; empty if the dataset version has no names."""

    given: str
    given_probability: float
    suggested: str
    suggested_probability: float
    score: float
    """0.5: the model is undecided; 1: it is certain that the label is wrong."""


class FoundLabelErrors(Record):
    """Summary of a search for wrong labels."""

    model: str
    """`name/version`."""

    name: str
    """Of the model."""

    images: dict[Split, int]
    suspects: dict[Split, int]
    named: bool
    """Whether the dataset version knows the images' file names."""

    table: Path
    page: Path


def label_errors_page(
    found: FoundLabelErrors, suspects: Sequence[Suspect], splits: Mapping[Split, "SplitReader"]
) -> str:
    """Returns an HTML page with the first `SHOWN` suspects, and how to correct their labels.

    Args:
        suspects: the worst first.
        splits: of the dataset version.
    """
    shown = suspects[:SHOWN]
    total = sum(found.images.values())
    title = f"Labels of {found.model} that are probably wrong"
    pairs = Counter((each.given, each.suggested) for each in suspects).most_common(SHOWN_PAIRS)
    seen = {"train": "yes"}
    head = [
        f"**{len(suspects):,} of {total:,} images.** The first {len(shown):,} are shown; "
        f"{plain(found.table.name)} lists all.",
        "",
        *table(
            ("split", "images", "listed", "seen in training"),
            ((each, found.images[each], found.suspects[each], seen.get(each, "no")) for each in SPLITS),
            "lrrl",
        ),
        "",
        METHOD,
        "",
        SEEN,
    ]
    if found.named:
        head += ["", *correcting(found)]
    else:
        head += ["", UNNAMED]
    if pairs:
        rows = ((given, suggested, count) for (given, suggested), count in pairs)
        head += ["", "## Most frequent pairs", "", *table(("label", "suggested", "images"), rows, "llr")]
    pictures = _pictures(shown, splits)
    figures = [_figure(rank, *each) for rank, each in enumerate(zip(shown, pictures, strict=True), 1)]
    body = f"<h1>{escape(title)}</h1>{rendered(chr(10).join(head))}"
    if figures:
        body += f'<h2>Images, the worst first</h2><div class="suspects">{"".join(figures)}</div>'
    return document(title, body, STYLE)


def correcting(found: FoundLabelErrors) -> list[str]:
    """Returns how to go on, as lines of Markdown."""
    return [
        f"To correct labels, write the right ones into the column *label* of {plain(found.table.name)}; rows that you "
        "leave as they are change nothing, and may be deleted. Then write a table of all images, in the folder that "
        "their paths begin from, and train on it:",
        "",
        f"    convoy errors {quote(found.model)} --corrected {quote(found.table.name)} --out FOLDER/labels.csv",
        f"    convoy train --dataset FOLDER/labels.csv --name {quote(found.name)}",
    ]


def _pictures(suspects: Sequence[Suspect], splits: Mapping[Split, "SplitReader"]) -> list[Image.Image]:
    """Returns the images in their order; each split is read once."""
    from tasks.reporting.drawing import images_at, rgb  # it loads torch

    made: dict[tuple[Split, int], Image.Image] = {}
    for split, reader in splits.items():
        if positions := [each.position for each in suspects if each.split == split]:
            for position, image in zip(positions, images_at(reader, positions), strict=True):
                made[split, position] = Image.fromarray(rgb(image.numpy()))
    return [made[each.split, each.position] for each in suspects]


def _figure(rank: int, suspect: Suspect, picture: Image.Image) -> str:
    place = f"{suspect.split} {suspect.position}"
    lines = (
        f"<b>{rank}.</b> {escape(suspect.path or place)}",
        f"label <b>{escape(suspect.given)}</b> ({suspect.given_probability:.1%})",
        f"suggested <b>{escape(suspect.suggested)}</b> ({suspect.suggested_probability:.1%})",
        f"score {suspect.score:.3f}" + (f", {place}" if suspect.path else ""),
    )
    pixels = ' class="pixels"' if picture.width < PIXELATED_BELOW else ""
    image = f'<img{pixels} alt="{place}" src="{webp(picture)}">'
    return f"<figure>{image}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
