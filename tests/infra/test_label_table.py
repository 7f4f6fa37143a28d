"""Label tables: what is read of them, and every oddity that is named with its row."""

import datetime
import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn.formats.layout import SUFFIXES
from infra.errors import UsageError
from infra.sources.label_table import IMAGE_SUFFIXES, FaultyTable, LabelTable, TableOptions, read_table

NAMES = [f"{name}.png" for name in ("b", "a/b", "é", "a.b", "Z", "\U0001f600", "\uffee")]
GOOD = {
    "comma": ("t.csv", "path,label,camera\na.png,cat,left\nb.png,dog,\n"),
    "tab": ("t.tsv", "path\tlabel\tcamera\na.png\tcat\tleft\nb.png\tdog\t\n"),
    "lines": ("t.jsonl", '{"path":"a.png","label":"cat","camera":"left"}\n{"path":"b.png","label":"dog"}\n'),
    "another order": ("t.csv", "camera,label,path\n,dog,b.png\nleft,cat,a.png\n"),
    "with a mark of UTF-8, CRLF and blank lines": (
        "t.CSV",
        "\ufeffpath,label,camera\r\n\r\na.png,cat,left\r\n\r\nb.png,dog,\r\n\r\n",
    ),
    "quoted": ("t.csv", '"path","label","camera"\n"a.png","cat","left"\n"b.png","dog",""\n'),
    "without an end of line": ("t.csv", "path,label,camera\na.png,cat,left\nb.png,dog,"),
    "paths with dots and double slashes": ("t.csv", "path,label,camera\n./x/../a.png,cat,left\n.//b.png,dog,\n"),
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(folder: Path, name: str, content: str | bytes, **options: object) -> LabelTable:
    file = written(folder, name, content)
    return read_table(file, name, TableOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", GOOD)
def test_the_same_rows_are_read_of_every_format(case: str, tmp_path: Path) -> None:
    table = read(tmp_path, *GOOD[case])
    assert table.values("path") == ["a.png", "b.png"]
    assert table.values("label") == ["cat", "dog"]
    assert table.values("meta.camera") == ["left", None]
    assert (table.values("split"), table.values("group"), table.columns) == (None, None, ("camera",))
    assert table.full_digest == read(tmp_path, *GOOD["comma"]).full_digest
    table.save(tmp_path / "saved")
    again = LabelTable.load(tmp_path / "saved")
    assert (again.full_digest, again.columns) == (table.full_digest, table.columns)


def test_values_of_parquet_become_text(tmp_path: Path) -> None:
    columns = {
        "path": ["b.png", "a.png"],
        "label": pa.array([1, 0], pa.int8()),
        "taken": [datetime.date(2026, 1, 31), None],
        "sharp": [True, False],
        "weight": [0.5, float("nan")],
        "site": pa.array(["x", "y"]).dictionary_encode(),
        "box": [[1, 2], [3]],
        "pixels": [b"\x00", b"\x01"],
        "__index_level_0__": [7, 8],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", "t.parquet", TableOptions())
    assert table.values("label") == ["0", "1"] and table.columns == ("taken", "sharp", "weight", "site")
    assert [table.values(f"meta.{name}") for name in table.columns] == [
        [None, "2026-01-31"],
        ["false", "true"],
        [None, "0.5"],
        ["y", "x"],
    ]


def test_columns_may_have_other_names_and_a_group_is_metadata_too(tmp_path: Path) -> None:
    text = "file,kind,subset,patient,label\na.png,cat,Training,p1,0\nb.png,dog,,,1\n"
    table = read(tmp_path, "t.csv", text, path="file", label="kind", split="subset", group="patient", needs_group=True)
    assert table.values("label") == ["cat", "dog"] and table.values("split") == ["training", None]
    assert table.values("group") == ["p1", None] == table.values("meta.patient")
    assert table.columns == ("patient", "label") and table.values("meta.label") == ["0", "1"]


def test_a_group_has_one_name_whatever_its_bytes(tmp_path: Path) -> None:
    composed, decomposed = "M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller", "Mu\N{COMBINING DIAERESIS}ller"
    table = read(tmp_path, "t.csv", f"path,label,group\na.png,cat,{composed}\nb.png,dog,{decomposed}\n")
    assert table.values("group") == [composed, composed]


def test_only_what_decides_a_dataset_version_is_in_its_digest(tmp_path: Path) -> None:
    base = read(tmp_path, "t.csv", "path,label,camera\na.png,cat,left\n")
    for text, same in (
        ("path,label,camera\na.png,cat,right\n", True),
        ("path,label\na.png,cat\n", True),
        ("path,label,camera\na.png,dog,left\n", False),
        ("path,label,camera\nb.png,cat,left\n", False),
        ("path,label,split\na.png,cat,test\n", False),
        ("path,label,group\na.png,cat,p1\n", False),
    ):
        table = read(tmp_path, "t.csv", text)
        assert (table.digest == base.digest) is same, text
        assert table.full_digest != base.full_digest, text


def test_a_column_without_a_name_is_passed_over(tmp_path: Path) -> None:
    assert read(tmp_path, "t.csv", ",path,label\n0,a.png,cat\n1,b.png,dog\n").columns == ()


# --- a table of odd rows -----------------------------------------------------------------------------

ODD_ROWS: dict[str, str] = {
    # A row of the columns path, label, split and note -> its fault; empty if it has none.
    "a.png,cat,train,": "",
    "b.png,dog,VAL,": "",
    "c.png,dog,Testing,": "",
    "d.png,dog,,": "",
    "e.png,café,,": "",
    '"f, g.png",cat,,': "",
    'h.png,"cat ""small""",,': "",
    '"i\nj.png",cat,,': "",
    "k.png,cat,,'": "",
    "l.PNG,cat,,": "",
    "m,cat,,": "names 'm', which is no PNG, JPEG, WebP or BMP file by its name",
    "n.png,-,,": "",
    "o.png,nan,,": "",
    "p.png,None,,": "",
    "q.png,😀,,": "",
    "r.png,cat/small,,": "",
    "../s.png,cat,,": "",
    "/t.png,cat,,": "",
    "s3://bucket/u.png,cat,,": "",
    "S3.png,cat,,": "",
    "v.png,1e3,,": "",
    "w.png,TRUE,,": "",
    "x.png,=1+1,,": "",
    "y.png,cat,,a note": "",
    "z.png,a\u00a0b,,": "",
    ",cat,,": "has no path",
    " ,cat,,": "has no path",
    "\u00a0,cat,,": "has no path",
    "aa.png,,,": "has no label",
    "ab.png, ,,": "has no label",
    "ac.png,\t,,": "has no label",
    ",,,": "has no path",
    "ad.png, cat,,": "has blanks around its label ' cat'",
    "ae.png,cat ,,": "has blanks around its label 'cat '",
    "af.png,cat\u00a0,,": "has blanks around its label 'cat\\xa0'",
    'ag.png,"cat\n",,': "has blanks around its label 'cat\\n'",
    " ah.png,cat,,": "has blanks around its path ' ah.png'",
    "ai.png ,cat,,": "has blanks around its path 'ai.png '",
    "aj.png": "has 1 field, not 4",
    "ak.png,cat": "has 2 fields, not 4",
    "al.png,cat,train,x,y": "has 5 fields, not 4",
    "am.png;cat;train;x": "has 1 field, not 4",
    "an.png,cat,,,": "has 5 fields, not 4",
    "ao, ap.png,cat,,": "has 5 fields, not 4",
    "aq.png,cat,dev,": "has the split 'dev'; known are train, val and test",
    "ar.png,cat,0,": "has the split '0'; known are train, val and test",
    "as.png,cat,trian,": "has the split 'trian'; known are train, val and test",
    "at.png,cat,train/val,": "has the split 'train/val'; known are train, val and test",
    "a.png,cat,,": "repeats the path of row 2, 'a.png'",
    "./a.png,dog,,": "repeats the path of row 50, 'a.png'",
    "x/../b.png,dog,,": "repeats the path of row 3, 'b.png'",
    ".//c.png,dog,,": "repeats the path of row 4, 'c.png'",
    "img\\au.png,cat,,": "has backslashes in its path 'img\\\\au.png'; write / between folders",
    "C:\\av.png,cat,,": "has backslashes in its path 'C:\\\\av.png'; write / between folders",
    "https://x.org/aw.png,cat,,": "names 'https://x.org/aw.png': a path or an s3:// address of an object is needed",
    "file:///ax.png,cat,,": "names 'file:///ax.png': a path or an s3:// address of an object is needed",
    "s3://bucket.png,cat,,": "names 's3://bucket.png': a path or an s3:// address of an object is needed",
    "s3://bucket/,cat,,": "names 's3://bucket/', which is no PNG, JPEG, WebP or BMP file by its name",
    "s3:///key.png,cat,,": "names 's3:///key.png': a path or an s3:// address of an object is needed",
    "s3://bucket/folder/,cat,,": "names 's3://bucket/folder/', which is no PNG, JPEG, WebP or BMP file by its name",
    "ay.png,1,,": "",
    "az.png,1.0,,": "has the label '1.0', and row 62 '1': the same number",
    "ba.png,01,,": "has the label '01', and row 62 '1': the same number",
    "bb.png,+1,,": "has the label '+1', and row 62 '1': the same number",
    "bc.png,1.,,": "has the label '1.', and row 62 '1': the same number",
    "bd.png,2,,": "",
    "be.png,-2,,": "",
    "bf.png,2.5,,": "",
    "bg.png,2.50,,": "has the label '2.50', and row 69 '2.5': the same number",
    "by.png,10000921000119107,,": "",
    "bz.png,10000921000119108,,": "",
    f"ca.png,{200 * '9'},,": "",
    f"cb.png,{199 * '9'}8,,": "",
    "bh.png,cat\u200b,,": "has an invisible character in its label 'cat\\u200b'",
    "bi.png,\ufeffcat,,": "has an invisible character in its label '\\ufeffcat'",
    "bj.png,c\x07at,,": "has an invisible character in its label 'c\\x07at'",
    'bk.png,"c\nat",,': "has an invisible character in its label 'c\\nat'",
    "bl.png,c\tat,,": "has an invisible character in its label 'c\\tat'",
    "bm.png,\u200dcat,,": "has an invisible character in its label '\\u200dcat'",
    "bn.png,ca\u200dt,,": "",
    "b\udce9.png,cat,,": "is not text in UTF-8",
    "bo.png,caf\udce9,,": "is not text in UTF-8",
    "bp.png,cat,,caf\udce9": "is not text in UTF-8",
    "bq.png,cat,tr\udce9,": "is not text in UTF-8",
    "/etc/passwd/,cat,,": "names '/etc/passwd/', which is no PNG, JPEG, WebP or BMP file by its name",
    "/etc/passwd/.,cat,,": "names '/etc/passwd/.', which is no PNG, JPEG, WebP or BMP file by its name",
    "br.png,c\u2028at,,": "has an invisible character in its label 'c\\u2028at'",
    f"bs.png,{255 * 'x'},,": "",
    f"bt.png,{256 * 'x'},,": "has a label of 256 characters; at most 255 are allowed",
}


def test_every_odd_row_is_named(tmp_path: Path) -> None:
    text = "path,label,split,note\n" + "\n".join(ODD_ROWS) + "\n"
    expected, row = [], 1
    for _, fault in ODD_ROWS.items():
        row += 1
        if fault:
            expected.append(f"row {row} {fault}")
    with pytest.raises(FaultyTable) as refused:
        read(tmp_path, "t.csv", text.encode(errors="surrogateescape"))
    assert sorted(refused.value.faults) == sorted(expected)
    assert refused.value.count == len(expected)
    first = str(refused.value)
    assert "\n" not in first and first.startswith("t.csv: row 12 names ")
    assert first.endswith(f"; and {len(expected) - 5} more, which `convoy data check` lists; correct the table")


def parquet(**columns: pa.Array) -> bytes:
    file = BytesIO()
    rows = len(next(iter(columns.values())))
    names = {"path": [f"{row}.png" for row in range(rows)], "label": [f"{row:04}" for row in range(rows)]}
    pq.write_table(pa.table(names | columns), file)
    return file.getvalue()


def damaged_parquet() -> bytes:
    whole = parquet(note=pa.array(map(str, range(2000))))
    return whole[:100] + bytes(2000) + whole[2100:]


ODD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("t.csv", "", "t.csv is empty; its first row must name its columns"),
    "only blank lines": ("t.csv", "\n\n", "is empty"),
    "only a header": ("t.csv", "path,label\n", "has no rows below its header"),
    "no header": ("t.csv", "a.png,cat\nb.png,dog\n", "first row, 'a.png, cat', names no columns; put 'path,label'"),
    "semicolons": ("t.csv", "path;label\na.png;cat\n", "separated by ';'; save it with commas"),
    "tabs in a .csv": ("t.csv", "path\tlabel\na.png\tcat\n", "separated by a tab; save it as .tsv"),
    "commas in a .tsv": ("t.tsv", "path,label\na.png,cat\n", "separated by ','; save it as .csv"),
    "UTF-16": ("t.csv", "path,label\na.png,cat\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "Latin-1 in the header": ("t.csv", b"path,label,caf\xe9\na.png,cat,x\n", "is not UTF-8"),
    "an open quotation mark": ("t.csv", 'path,label\na.png,"cat\nb.png,dog\n', "row 2 cannot be read"),
    "a text behind a quotation mark": ("t.csv", 'path,label\na.png,"cat"s\n', "row 2 cannot be read"),
    "a column in capitals": ("t.csv", "Path,label\na.png,cat\n", "no column 'path': did you mean 'Path'"),
    "no column of labels": (
        "t.csv",
        "path,class\na.png,cat\n",
        "no column 'label': its columns are path, class",
    ),
    "a column twice": ("t.csv", "path,label,label\na.png,cat,dog\n", "two columns are called 'label'"),
    "a blank in a column's name": (
        "t.csv",
        "path, label\na.png,cat\n",
        "column name ' label' has blanks",
    ),
    "too many columns": ("t.csv", "path,label," + ",".join(f"c{i}" for i in range(199)) + "\n", "has 201 columns"),
    "no JSON": ("t.jsonl", '{"path":"a.png","label":"cat"}\n{oops}\n', "row 2 is not JSON"),
    "a JSON array": ("t.jsonl", '[{"path":"a.png","label":"cat"}]\n', "row 1 is no JSON object"),
    "JSON without labels": ("t.jsonl", '{"path":"a.png"}\n', "no column 'label'"),
    "JSON, one label missing": ("t.jsonl", '{"path":"a.png","label":1}\n{"path":"b.png"}\n', "row 2 has no label"),
    "JSON, a label that is null": ("t.jsonl", '{"path":"a.png","label":null}\n', "row 1 has no label"),
    "JSON, several labels": (
        "t.jsonl",
        '{"path":"a.png","label":["cat"]}\n',
        'has a label that is no text: ["cat"]',
    ),
    "JSON, mixed numbers": (
        "t.jsonl",
        '{"path":"a.png","label":1}\n{"path":"b.png","label":1.0}\n',
        "row 2 has the label '1.0'",
    ),
    "an empty .jsonl": ("t.jsonl", "\n", "is empty"),
    "no Parquet": ("t.parquet", "path,label\n", "is not a whole Parquet file"),
    "JSON, too deep": ("t.jsonl", '{"path":"a.png","label":' + 100_000 * "[" + "\n", "row 1 is not JSON"),
    "a damaged Parquet": ("t.parquet", damaged_parquet(), "t.parquet cannot be read after row 0"),
    "Parquet, the year 100 000": ("t.parquet", parquet(taken=pa.array([2**61], pa.timestamp("us"))), "after row 0"),
    "a line break in a column's name": ("t.csv", 'path,label,"a\nb"\na.png,cat,x\n', "an invisible character"),
    "a blank behind a group": ("t.csv", "path,label,group\na.png,cat,p \n", "row 2 has blanks around its group 'p '"),
    "an Excel file": ("t.csv", b"PK\x03\x04\x14\x00\x06\x00", "t.csv"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_a_file_that_is_no_label_table_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, words = ODD_FILES[case]
    with pytest.raises(UsageError) as refused:
        read(tmp_path, name, content)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_column_of_the_group_is_missed_only_where_it_is_named(tmp_path: Path) -> None:
    text = "path,label\na.png,cat\n"
    assert read(tmp_path, "t.csv", text).values("group") is None
    with pytest.raises(
        UsageError, match=r"no column 'patient': its columns are path, label; data\.group names another"
    ):
        read(tmp_path, "t.csv", text, group="patient", needs_group=True)


def test_a_table_in_a_bucket_names_no_file_of_this_machine(tmp_path: Path) -> None:
    file = written(tmp_path, "t.csv", "path,label\n/etc/p.png,cat\n../a.png,cat\nb/../../c.png,dog\nd/../e.png,dog\n")
    with pytest.raises(FaultyTable) as refused:
        read_table(file, "t.csv", TableOptions(), in_bucket=True)
    assert [fault.split(":")[0] for fault in refused.value.faults] == [
        "row 2 names '/etc/p.png'",
        "row 3 names '../a.png'",
        "row 4 names 'b/../../c.png'",
    ]


def test_rows_are_sorted_like_a_listing_and_found_by_path(tmp_path: Path) -> None:
    lines = [json.dumps({"path": path, "label": "x"}) for path in NAMES]
    table = read(tmp_path, "t.jsonl", "\n".join(lines))
    assert table.required("path") == sorted(NAMES)
    assert table.positions(["a/b.png", "no.png", None, "Z.png"]).tolist() == [2, -1, -1, 0]
    assert table.rows == [5, 4, 2, 1, 3, 7, 6]


def test_images_have_the_same_names_in_tables_and_in_folders() -> None:
    assert frozenset(IMAGE_SUFFIXES) == SUFFIXES
