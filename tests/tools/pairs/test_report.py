"""The report page: complete, self-contained, and safe to show any text. About 2 s."""

import html.parser
import json
import re

from spot_megatron.files import write_rows
from tests.tools.pairs.support import ASSETS, an_error, run
from tools.pairs.filter import Keep
from tools.pairs.measures import Measures
from tools.pairs.report import CONTEXT_WORDS, ReportData, distributions, word_diff

RIGHT = r"here 4*2=8. then 7*9=63. the answer is \boxed{8,63}."
ELICIT = {"stage": "elicit", "question_rows": 120, "questions": 100, "questions_dropped": {"duplicate": 20}}
ELICIT |= {
    "samples_per_question": 1,
    "samples": 100,
    "correct": 41,
    "errors": 40,
    "undecided": 14,
    "pending": 0,
    "excluded": {"cut_off": 5},
}
ELICIT |= {"http_calls": 130, "prompt_tokens": 1000, "completion_tokens": 2000}
RECTIFY = {"stage": "rectify", "errors": 40, "rectified": 3, "rejected": {"wrong_answer": 37}, "cost_usd": 1.25}
RECTIFY |= {"http_calls": 77, "prompt_tokens": 3000, "completion_tokens": 4000, "settings": {"model": "the-oracle"}}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def make_page(folder, table, upstream=True) -> str:
    write_rows(folder / "rectified.jsonl", table)
    write_rows(folder / "rejected.jsonl", [an_error("lost", reason="change_ratio", rejected_attempts=[])])
    if upstream:
        (folder / "summary.json").write_text(json.dumps({**RECTIFY, "upstream": {**ELICIT, "folder": "elicit"}}))
        undecided = [
            an_error(f"u{number:02}", extracted=f"<b>{number}</b>", reason="not_proved") for number in range(14)
        ]
        write_rows(folder / "elicit" / "undecided.jsonl", undecided)
    options = ("--tokenizer", ASSETS, "--output", folder / "pairs.jsonl", "--report", folder / "report.html")
    run("pairs", "--rectified", folder / "rectified.jsonl", *options)
    return (folder / "report.html").read_text()


def test_the_page_shows_the_whole_way_and_needs_no_network(tmp_path):
    hostile = "<script>alert(1)</script> & <b>"
    table = [an_error("q0", corrected=RIGHT, pass_rate=0.25)]
    table.append(an_error("q<1>", corrected=RIGHT, question=hostile, prompt=hostile))
    source = make_page(tmp_path, [*table, an_error("q2", corrected="none")])
    page = Page()
    page.feed(source)
    assert not page.open
    text = " ".join(" ".join(page.text).split())
    for shown in (
        "2 pairs",
        "120",
        "duplicate 20",
        "cut off 5",
        "wrong answer 37",
        "not verified 1",
        "the-oracle",
        "0.25 1",
        "1.25",
        "undecided 14",
        "14 undecided answers",
        "the first 12 are shown",
        "u11 4*2, 7*9 8,63 <b>11</b> not proved",
    ):
        assert shown in text, shown
    assert hostile in " ".join(page.text)
    assert "lost · change ratio" in text
    assert "u12" not in text
    assert page.tags.count("main") == 1
    assert source.count("<th>") == 0
    assert page.tags.count("script") == 3  # BokehJS, its log level, and what draws the charts
    assert "default-src 'none'" in source
    markup = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=|url\(|https?://|@import", markup)
    assert 'name="viewport"' in source
    assert source.count('class="plot"') == 6 + 6  # stages and distributions
    assert page.tags.count("del") == 4


def test_a_file_from_elsewhere_and_an_empty_one_have_a_page_too(tmp_path):
    page = make_page(tmp_path, [an_error("q0", corrected=RIGHT)], upstream=False)
    assert "1 pairs" in page
    assert "undecided answers" not in page
    assert "0 pairs" in make_page(tmp_path, [an_error("q0", corrected="none")], upstream=False)


def test_the_diff_loses_no_word():
    rejected = "same " * 200 + "wrong step here. " + "tail " * 100 + r"\boxed{8,65}"
    chosen = "same " * 200 + "right thing. " + "tail " * 100 + r"\boxed{8,63}"
    sides = word_diff(rejected, chosen)
    for name, text in (("rejected", rejected), ("chosen", chosen)):
        plain = re.sub(r"<summary>.*?</summary>|<[^>]+>", "", sides[name])
        assert plain == text
        assert sides[name].count("<details>") == 2
    assert "<del>wrong step here</del>" in sides["rejected"]
    assert "<ins>right thing</ins>" in sides["chosen"]
    assert sides["rejected"].index("<del>") > CONTEXT_WORDS


def test_word_diff_of_equal_and_of_unrelated_texts():
    assert word_diff("a b", "a b") == {"rejected": "a b", "chosen": "a b"}
    assert word_diff("", "x") == {"rejected": "", "chosen": "<ins>x</ins>"}


def test_distributions_hold_every_pair():
    data = ReportData(0.6, measured=[Measures(n, 100, 90, 100 - 10 * n, 5) for n in range(1, 11)])
    charts = {chart.title: chart for chart in distributions(data, data.measured[:4])}
    for title, count in (("Change ratio R", 10), ("Edited tokens", 4), ("Prompt tokens", 4)):
        assert sum(int(row[1]) for row in charts[title].rows) == count
    assert charts["Change ratio R"].keys[-1].value == "0.6"
    assert all(chart.figure is None for chart in distributions(ReportData(0.6), []))


def test_samples_are_drawn_evenly():
    measures = Measures(1, 10, 10, 9, 5)
    shown = 0
    for seed in range(60):
        data = ReportData(0.6, seed=seed)
        for number in range(100):
            data.add(Keep({"id": number}, measures))
        assert len({row["id"] for row in data.samples}) == 12
        shown += sum(row["id"] >= 50 for row in data.samples)
    assert 250 < shown < 470  # half of 720
