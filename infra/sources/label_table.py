"""Label tables: files in which every row names an image, its label and what else is known of it.

Tables are written by many tools and by hand, so every oddity is named with its row, and none is guessed at.
"""

import csv
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.errors import UsageError, counted, escaped
from infra.sources.listing import BATCH

META = "meta."
"""Begins the names of further columns in a `LabelTable`, so that they cannot be taken for its own."""

SPLIT_WORDS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
MAX_NAMED = 5  # faulty rows in a message
MAX_FAULTS = 100_000  # that are collected
MAX_FAULT = 500  # characters of the message about one
MAX_COLUMNS = 200
MAX_NAME = 255  # characters of a label, as of a class folder

_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")
"""What the names of images end with. A table from elsewhere must not have other files of this machine copied."""

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")

Row = tuple[int, list[Any]]
"""The row's number, as a spreadsheet or an editor shows it, and a value per column."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How label tables are read: names of columns, and how many files may be missing."""

    path: str = "path"
    label: str = "label"
    split: str = "split"
    group: str = "group"
    needs_group: bool = False
    """Whether a table without the group's column is refused."""

    max_missing: float = 0.01
    """Largest share of rows whose files are missing."""

    def are_in(self, columns: Iterable[str]) -> bool:
        """Returns whether a table `metadata.csv` with these columns is about the images beside it."""
        return self.needs_group or bool({self.path, self.label, self.split, self.group} & set(columns))


class FaultyTable(UsageError):
    """Rows of a label table are faulty."""

    def __init__(self, where: str, faults: list[str], count: int) -> None:
        more = f"; and {count - MAX_NAMED} more, which `convoy data check` lists" if count > MAX_NAMED else ""
        super().__init__(f"{where}: {'; '.join(faults[:MAX_NAMED])}{more}; correct the table")
        self.faults = faults
        self.count = count


class LabelTable:
    """Rows in the order of their paths' code points: `path`, perhaps `label`, `split` and `group`, and further columns.

    All values are text or None. A million rows take about 100 MB of memory.

    Args:
        table: its columns, and `row`, the number of each row in the file, unless it was saved.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @classmethod
    def load(cls, path: Path) -> "LabelTable":
        """Reads a file that `save` wrote."""
        return cls(pq.read_table(path))

    def save(self, path: Path) -> None:
        """Writes a Parquet file."""
        names = [name for name in self._table.column_names if name != "row"]
        pq.write_table(self._table.select(names), path, compression="zstd")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the further columns."""
        return further_names(self._table.column_names)

    def values(self, column: str) -> list[str | None] | None:
        """Returns the values of a column; None if the table lacks it."""
        return self._table[column].to_pylist() if column in self._table.column_names else None

    def required(self, column: str) -> list[str]:
        """Returns the values of a column that has a text in every row."""
        found: list[str] = self._table[column].to_pylist()
        return found

    @property
    def rows(self) -> list[int]:
        """Number of each row, as a spreadsheet or an editor shows it."""
        found: list[int] = self._table["row"].to_pylist()
        return found

    def positions(self, paths: Sequence[str | None]) -> NDArray[np.int64]:
        """Returns the row of each path; -1 where there is none."""
        wanted = pa.array(paths, pa.large_string())
        found = pc.index_in(wanted, value_set=self._table["path"].combine_chunks())
        positions: NDArray[np.int64] = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return positions

    def take(self, positions: NDArray[np.int64]) -> "LabelTable":
        """Returns the rows at these positions."""
        return LabelTable(self._table.take(pa.array(positions)))

    def for_files(self, paths: Sequence[str]) -> "LabelTable":
        """Returns a row per file, without labels; files that the table does not name have a row of None."""
        positions, wanted = self.positions(paths), pa.array(paths, pa.large_string())
        names = [name for name in self._table.column_names if name not in ("label", "row")]
        table = self._table.select(names).take(pa.array(positions, mask=positions < 0))
        return LabelTable(table.set_column(names.index("path"), "path", wanted))

    @property
    def further(self) -> pa.Table:
        """The further columns, as `meta.<name>`."""
        return self._table.select([name for name in self._table.column_names if name.startswith(META)])

    @property
    def digest(self) -> str:
        """SHA-256 of what decides a dataset version: paths, labels, splits and groups."""
        return self._digest([name for name in self._table.column_names if name in ("path", "label", "split", "group")])

    @property
    def full_digest(self) -> str:
        """SHA-256 of all columns."""
        return self._digest([name for name in self._table.column_names if name != "row"])

    def _digest(self, names: list[str]) -> str:
        digest = sha256(json.dumps(names).encode())
        for batch in self._table.select(names).to_batches(BATCH):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()


def further_names(columns: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the further columns among all columns of a table, without `META`."""
    return tuple(name.removeprefix(META) for name in columns if name.startswith(META))


def read_table(
    file: Path, where: str, options: TableOptions, *, labelled: bool = True, in_bucket: bool = False
) -> LabelTable:
    """Reads and checks a label table.

    Args:
        file: the table on this machine; its name tells its format.
        where: its name in messages.
        labelled: whether it must have a column of labels.
        in_bucket: whether it comes from a bucket, where it may name objects only.

    Raises:
        FaultyTable: rows are faulty; it names them.
        UsageError: the file is no such table.
    """
    header, rows = _open(file, where)
    return _Checker(where, header, options, labelled=labelled, in_bucket=in_bucket).check(rows)


def header_of(file: Path, where: str) -> list[str]:
    """Returns the names of a table's columns; see `read_table`."""
    return _open(file, where)[0]


# --- formats ---------------------------------------------------------------------------------------


def _open(file: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from None
    if encoding := _BOMS.get(start):
        raise UsageError(f"{where} is text in {encoding}; save it as UTF-8")
    match Path(where).suffix.lower():
        case ".jsonl":
            return _read_lines(file, where)
        case ".parquet":
            return _read_parquet(file, where)
        case suffix:
            return _read_delimited(file, where, "\t" if suffix == ".tsv" else ",")


def _read_delimited(file: Path, where: str, delimiter: str) -> tuple[list[str], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        # Wrong bytes become lone surrogates, so that the check can name their row.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader, number = csv.reader(stream, delimiter=delimiter, strict=True), 0
            while True:
                number += 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    hint = "; is there a quotation mark too many?" if "NUL" not in str(error) else ""
                    raise UsageError(f"{where}: row {number} cannot be read ({error}){hint}") from None
                if fields:
                    yield number, fields

    found = rows()
    _, header = next(found, (0, None))
    if header is None:
        raise UsageError(f"{where} is empty; its first row must name its columns")
    if len(header) == 1 and (other := next((mark for mark in ";\t,|" if mark in header[0]), None)):
        name = "a tab" if other == "\t" else f"'{other}'"
        save = "save it as .tsv" if other == "\t" else "save it with commas" if delimiter == "," else "save it as .csv"
        raise UsageError(f"{where}: its columns seem to be separated by {name}; {save}")
    if any(name.strip().lower().endswith(IMAGE_SUFFIXES) for name in header):
        raise UsageError(f"{where}: its first row, {', '.join(header)!r}, names no columns; put 'path,label' above it")
    return header, found


def _read_lines(file: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{where}: row {number} is not JSON ({error})") from None
                if not isinstance(found, dict):
                    raise UsageError(f"{where}: row {number} is no JSON object, such as {{'path': …, 'label': …}}")
                yield number, found

    header = list(dict.fromkeys(key for _, found in objects() for key in found))
    if not header:
        raise UsageError(f"{where} is empty; each line must be a JSON object with a path and a label")
    return header, ((number, [found.get(key) for key in header]) for number, found in objects())


def _read_parquet(file: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not a whole Parquet file ({error})") from None
    skipped = (  # encoded images, boxes, ...
        pa.types.is_nested,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    header = [
        each.name
        for each in opened.schema_arrow
        if not any(is_kind(each.type) for is_kind in skipped) and not each.name.startswith("__index_level_")
    ]

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in opened.iter_batches(BATCH, columns=header):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield number, list(values)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # damage, or a date after 9999
            raise UsageError(f"{where} cannot be read after row {number} ({error})") from None

    return header, rows()


# --- checks ----------------------------------------------------------------------------------------


@dataclass
class _Faults:
    where: str
    named: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.named) < MAX_FAULTS:
            self.named.append(escaped(f"row {row} {text}"[:MAX_FAULT]))

    def refuse(self) -> None:
        if self.count:
            raise FaultyTable(self.where, self.named, self.count)


class _Checker:
    """Turns rows into a `LabelTable`, or refuses them."""

    def __init__(
        self, where: str, header: list[str], options: TableOptions, *, labelled: bool, in_bucket: bool
    ) -> None:
        self._where, self._header, self._in_bucket = where, header, in_bucket
        self._faults = _Faults(where)
        self._labels: dict[str, int] = {}  # to the row where each was found first
        self._check_header(options, labelled=labelled)
        own = {"path": options.path, "label": options.label, "split": options.split, "group": options.group}
        self._places = {role: header.index(name) for role, name in own.items() if name in header}
        # A group's column is metadata too, so that it can be a slice.
        roles = {options.path, options.label, options.split}
        self._further = {name: place for place, name in enumerate(header) if name and name not in roles}

    def _check_header(self, options: TableOptions, *, labelled: bool) -> None:
        where, header = self._where, self._header
        named = [name for name in header if name]
        if odd := next((name for name in named if name != name.strip() or escaped(name) != name), None):
            fault = "has blanks around it, an invisible character, or is not UTF-8"
            raise UsageError(f"{where}: the column name {odd!r} {fault}")
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise UsageError(f"{where}: two columns are called {twice!r}; rename one")
        if len(header) > MAX_COLUMNS:
            raise UsageError(f"{where} has {len(header)} columns, at most {MAX_COLUMNS} are read; leave some out")
        required = {"path": True, "label": labelled, "group": options.needs_group}
        for role, is_required in required.items():
            name = getattr(options, role)
            if is_required and name not in header:
                near = next((each for each in named if each.lower() == name.lower()), None)
                key = "data.group" if role == "group" and options.needs_group else f"data.columns.{role}"
                hint = f"did you mean {near!r}? " if near else ""
                known = ", ".join(named) or "none"
                raise UsageError(f"{where} has no column {name!r}: {hint}its columns are {known}; {key} names another")

    def check(self, rows: Iterable[Row]) -> LabelTable:
        tables, waiting = [], list[tuple[int, list[str | None]]]()
        names = [*(n for n in ("path", "label", "split", "group") if n in self._places), *map(_meta, self._further)]
        schema = pa.schema([("row", pa.int64()), *((name, pa.large_string()) for name in names)])

        def flush() -> None:
            columns = zip(*((number, *values) for number, values in waiting), strict=True)
            arrays = [pa.array(column, of.type) for column, of in zip(columns, schema, strict=True)]
            tables.append(pa.record_batch(arrays, schema=schema))
            waiting.clear()

        for number, values in rows:
            try:
                checked = self._row(number, values)
            except ValueError as fault:
                self._faults.add(number, str(fault))
                continue
            waiting.append((number, checked))
            if len(waiting) == BATCH:
                flush()
        if waiting:
            flush()
        self._check_labels()
        table = pa.Table.from_batches(tables, schema).combine_chunks()
        if table.num_rows:
            table = table.take(pc.sort_indices(table, [("path", "ascending"), ("row", "ascending")]))
            self._check_repeated(table)
        self._faults.refuse()
        if not table.num_rows:
            raise UsageError(f"{self._where} has no rows below its header")
        return LabelTable(table)

    def _row(self, number: int, values: list[Any]) -> list[str | None]:
        """Returns the row's values in the order of the table's columns; raises ValueError, which names its fault."""
        if len(values) != len(self._header):
            raise ValueError(f"has {counted(len(values), 'field')}, not {len(self._header)}")
        texts = [_text(value) for value in values]
        if any(text is not None and not text.isascii() and _wrong_bytes(text) for text in texts):
            raise ValueError("is not text in UTF-8")
        checked = {role: texts[place] for role, place in self._places.items()}
        for role in ("path", "label", "group"):
            if role not in checked:
                continue
            text = checked[role] or ""
            if isinstance(values[self._places[role]], list | dict):
                raise ValueError(f"has a {role} that is no text: {text[:MAX_NAME]}")
            if role != "group" and not text.strip():
                raise ValueError(f"has no {role}")
            if text != text.strip():
                raise ValueError(f"has blanks around its {role} {text!r}")
            if role == "label" and len(text) > MAX_NAME:
                raise ValueError(f"has a label of {len(text):,} characters; at most {MAX_NAME} are allowed")
        checked["path"] = self._normal(checked["path"] or "")
        if label := checked.get("label"):
            self._labels.setdefault(label, number)
        split = (checked.get("split") or "").strip().lower()
        if split and split not in SPLIT_WORDS:
            raise ValueError(f"has the split {split!r}; known are train, val and test")
        if "split" in checked:
            checked["split"] = split or None
        if "group" in checked:
            group = checked["group"] or None  # in one form: in another, the same name would be another group
            checked["group"] = group and unicodedata.normalize("NFC", group)
        return [*checked.values(), *(texts[place] or None for place in self._further.values())]

    def _normal(self, path: str) -> str:
        """Returns a path without `.` and double slashes; raises ValueError, which says what is wrong with it."""
        scheme, found, rest = path.partition("://")
        normal = path if found else posixpath.normpath(path)
        if not normal.lower().endswith(IMAGE_SUFFIXES):
            raise ValueError(f"names {path!r}, which is no PNG, JPEG, WebP or BMP file by its name")
        if found:
            bucket, _, key = rest.partition("/")
            if scheme != "s3" or not bucket or not key:
                raise ValueError(f"names {path!r}: a path or an s3:// address of an object is needed")
            return path
        if "\\" in path:
            raise ValueError(f"has backslashes in its path {path!r}; write / between folders")
        if "\0" in path:
            raise ValueError(f"has a zero byte in its path {path!r}")
        if self._in_bucket and (normal.startswith("/") or normal.split("/")[0] == ".."):
            raise ValueError(f"names {path!r}: a table in a bucket may name objects below it, or s3:// addresses")
        return normal

    def _check_labels(self) -> None:
        """Refuses labels that look alike but are not, and those with invisible characters."""
        numbers: dict[Decimal, str] = {}  # exact, since labels may be long
        for label, row in self._labels.items():
            if escaped(label) != label or "Cf" in map(unicodedata.category, (label[0], label[-1])):
                self._faults.add(row, f"has an invisible character in its label {label!r}")
            if _NUMBER.fullmatch(label):
                other = numbers.setdefault(Decimal(label), label)
                if other != label:
                    first = self._labels[other]
                    self._faults.add(row, f"has the label {label!r}, and row {first} {other!r}: the same number")

    def _check_repeated(self, table: pa.Table) -> None:
        paths = table["path"].combine_chunks()
        repeated = np.flatnonzero(pc.equal(paths[1:], paths[:-1]).to_numpy(zero_copy_only=False))
        for place in repeated.tolist():
            first, again = table["row"][place].as_py(), table["row"][place + 1].as_py()
            self._faults.add(again, f"repeats the path of row {first}, {paths[place].as_py()!r}")


def _meta(name: str) -> str:
    return META + name


def _text(value: Any) -> str | None:
    """Returns a value as text: numbers as they are written, no text for NaN."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _wrong_bytes(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
