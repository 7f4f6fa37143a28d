"""The table of the bucket in tasks/README.md is what `LAYOUT` says.

.venv/bin/python -m tests.infra.test_bucket_layout      writes the table into the page
"""

from pathlib import Path

from infra.storage.bucket_layout import LAYOUT

PAGE = Path(__file__).parents[2] / "tasks" / "README.md"
BEGIN, END = "<!-- bucket layout: begin -->", "<!-- bucket layout: end -->"


def as_markdown() -> str:
    """Returns `LAYOUT` as a Markdown table."""
    rows = (f"| `{place.pattern}` | {place.holds} | {place.commit or 'itself'} | {place.goes} |" for place in LAYOUT)
    return "\n".join(["| key | holds | counts once there is | deleted |", "|---|---|---|---|", *rows])


def with_table(page: str) -> str:
    """Returns a page with the table between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} has no part between {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{as_markdown()}\n\n{END}{after}"


def test_the_architecture_page_has_the_table_of_the_bucket() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run `python -m tests.infra.test_bucket_layout`, which writes the table"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
