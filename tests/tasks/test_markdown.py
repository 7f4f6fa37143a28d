"""Pages that contain texts from users."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from flows.summary import Summary, write_report
from tasks.config.gates import GateConfig
from tasks.evaluation.publish import report_markdown
from tasks.evaluation.report import evaluation_report
from tasks.prediction.predict import Predictions
from tasks.prediction.table import Unread
from tasks.release.quality.checks import Scored
from tasks.release.quality.judge import judge
from tasks.release.serving_gate import ServingCheck, ServingReport
from tasks.reporting.markdown import plain, shown
from tasks.reporting.markdown import table as markdown_table

NASTY = "a|b\nc [x](http://evil) ![i](u) <b>*bold*</b> `code` _em_ ~~gone~~ &amp; \\ snake_case $x$ ||"
SEEN = "a|b c [x](http://evil) ![i](u) <b>*bold*</b> `code` _em_ ~~gone~~ &amp; \\ snake_case $x$ ||"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def texts(tokens: list[Token]) -> list[str]:
    """Returns the text of each inline part that contains text only; else the kinds of its parts."""
    found = []
    for token in tokens:
        if token.type == "inline":
            kinds = {child.type for child in token.children or ()}
            content = "".join(child.content for child in token.children or ())
            found.append(content if kinds <= {"text", "text_special"} else str(kinds))
    return found


def cells(page: str) -> list[str]:
    return texts(MARKDOWN.parse(page))


@given(st.text(st.characters(codec="utf-8", max_codepoint=0x2FFF)))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    line = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())
    table = f"| a | b |\n|--|--|\n| {plain(text)} | end |"
    assert cells(table) == ["a", "b", line, "end"]
    assert cells("\n".join([*markdown_table((text, "b"), [(text, 1000)], "lr")])) == [line, "b", line, "1,000"]
    assert cells(plain(text)) == ([line] if line else [])
    assert shown(plain(text)).replace("**", "") == line.replace("**", "")


@pytest.mark.parametrize(
    "text", ["# a", "- a", "+ a", "> a", "1. a", "12) a", "---", "===", "* a", "    a", "~~~", "```"]
)
def test_a_text_begins_no_heading_list_quotation_or_code(text: str) -> None:
    assert cells(plain(text)) == [text.strip()]


def test_every_page_shows_names_as_they_are(tmp_path: object) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    logits = torch.eye(2)[torch.tensor([0, 0, 1, 1])]
    page = report_markdown(evaluation_report("test", logits, labels, [NASTY, "b"], slices={NASTY: [NASTY] * 4}))
    assert cells(page).count(SEEN) == 5  # among the classes, twice among the mistakes, as a column and its value
    scored = Scored(address=f"{NASTY}/1", correct=(labels == 0).numpy())
    champion = Scored(address="c/1", correct=(labels == 1).numpy(), obstacle=NASTY)
    verdict = judge(scored, champion, GateConfig(), labels=labels.numpy(), classes=(NASTY, "b")).markdown()
    assert {SEEN, f"{SEEN}/1"} <= set(cells(verdict))
    serving = ServingReport(
        model=f"models:/{NASTY}/1", tolerance=0.1, checks=(ServingCheck(name="x", passed=True, detail=NASTY),)
    )
    assert SEEN in cells(serving.markdown())
    unread = (Unread(file=NASTY, reason=NASTY),)
    done = Predictions(
        model="m", out=NASTY, images=2, unreadable=1, unreadable_examples=unread, classes={NASTY: 1}, temperature=1
    )
    assert cells(done.markdown()).count(SEEN) == 3


def test_a_jobs_summary_shows_names_as_they_are(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = Summary(status="refused", error=NASTY, reason=NASTY, verdict=NASTY, model_name=NASTY, model_version="1")
    write_report(tmp_path / "page.md", result, [f"**Refused**: {plain('<b>[x]')}\n\nmore"])
    page = (tmp_path / "page.md").read_text()
    assert {SEEN, f"{SEEN} version 1"} <= set(cells(page))
    assert "<summary>Refused: &lt;b&gt;[x]</summary>" in page
