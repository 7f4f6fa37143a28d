"""A folder with a sub-folder of images for each class, perhaps inside train, val and test folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from cnn.sources.block import FileBlock
from cnn.sources.layout import arrange

BLOCK = 32  # images; files are read one by one


class FolderSource:
    """Image files by their paths in the folder; the local files may have any names.

    A path that ends in `/` stands for a folder, and its local file is not looked at.

    Raises:
        InputError: see `cnn.sources.layout.arrange`.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        folders = [path for path in files if path.endswith("/")]
        self._layout = arrange((path for path in files if not path.endswith("/")), folders)
        self._files = tuple(files[name] for name in self._layout.names)
        self.classes = self._layout.classes
        self.remarks = self._layout.remarks

    def __len__(self) -> int:
        return len(self._files)

    def blocks(self) -> Iterator[FileBlock]:
        """All images in the order of their paths."""
        for start in range(0, len(self), BLOCK):
            chosen = slice(start, start + BLOCK)
            yield FileBlock(
                names=self._layout.names[chosen],
                files=self._files[chosen],
                labels=self._layout.labels[chosen],
                splits=self._layout.splits[chosen],
            )
