"""Reads a folder with a sub-folder of images per class, perhaps inside train, val and test folders."""

from collections.abc import Iterator, Sequence
from functools import partial

from cnn.formats.block import FileBlock
from cnn.formats.decode import MAX_FILE_BYTES, stand_in
from cnn.formats.files import Files
from cnn.formats.layout import Given, Layout, LeftOut, arrange, arrange_given

BLOCK_IMAGES = 32
BLOCK_BYTES = 4 * 2**20  # of files; a block ends before it exceeds this size, or at that number of images


class FolderImages:
    """The images of a folder.

    Args:
        left_out: other files that are known to be in the folder; None: those of `files` that are no images.
        given: what a label table says of `files`.

    Raises:
        InputError: see `cnn.formats.layout.arrange`.
    """

    def __init__(self, files: Files, left_out: LeftOut | None = None, given: Given | None = None) -> None:
        self._files = files
        given = given or Given()
        layout = arrange(files.paths, files.folders) if given.labels is None else None
        self._layout = arrange_given(given, layout)
        self.classes = self._layout.classes
        self.left_out = left_out or self._layout.left_out
        self.groups = _at(given.groups, self._layout) if given.groups else None

    def __len__(self) -> int:
        return len(self._layout.chosen)

    def names(self) -> Iterator[str]:
        """Yields the images' paths, without the folders around the class folders."""
        start = len(self._layout.root)
        for position in self._layout.chosen.tolist():
            yield self._files.paths[position][start:]

    def blocks(self) -> Iterator[FileBlock]:
        """Yields all images in the order of their paths."""
        start, total = 0, 0
        for stop in range(len(self)):
            size = self._files.size(int(self._layout.chosen[stop]))
            if stop > start and (stop - start == BLOCK_IMAGES or total + size > BLOCK_BYTES):
                yield self._block(start, stop)
                start, total = stop, 0
            total += size
        yield self._block(start, len(self))

    def _block(self, start: int, stop: int) -> FileBlock:
        positions = self._layout.chosen[start:stop].tolist()
        return FileBlock(
            names=[self._files.paths[position].removeprefix(self._layout.root) for position in positions],
            files=[partial(self._read, position) for position in positions],
            labels=self._layout.labels[start:stop],
            splits=self._layout.splits[start:stop],
        )

    def _read(self, position: int) -> bytes:
        size = self._files.size(position)
        return self._files.read(position) if size <= MAX_FILE_BYTES else stand_in(size)


def _at(values: Sequence[str | None], layout: Layout) -> list[str | None]:
    return [values[position] for position in layout.chosen.tolist()]
