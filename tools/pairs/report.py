"""The data report, one self-contained page: the funnel, the distributions, the cost, sample pairs."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from rapidfuzz.distance import LCSseq

from spot_megatron.files import Row, read_rows, write_text
from spot_megatron.report.charts import Chart, Group, Level, histogram, stacked_bar
from spot_megatron.report.html import render_page
from spot_megatron.report.numbers import number
from spot_megatron.report.plot import PALETTE
from tools.pairs.conversation import shown_problem, text_of, transcript
from tools.pairs.filter import Drop, Keep
from tools.pairs.measures import Measures

NUM_SAMPLES = 12
NUM_REJECTED = 6
NUM_UNDECIDED = 12
CONTEXT_WORDS = 30  # kept on each side of an edit; longer unchanged stretches are folded
STRAY_WORDS = 4  # fewer equal words after a rewrite of at least as many are a coincidence
NUM_BINS = 20


@dataclass
class ReportData:
    """Collects decisions as they come: numbers of all, texts of a few pairs drawn evenly."""

    gamma: float
    seed: int = 0
    measured: list[Measures] = field(default_factory=list)  # of every pair that got as far as the change ratio
    num_kept: int = 0
    samples: list[Row] = field(default_factory=list)
    pass_rates: Counter[float] = field(default_factory=Counter)  # of kept pairs whose elicitation had several samples
    rejected: list[Row] = field(default_factory=list)  # errors without an accepted edit, drawn evenly
    undecided: list[Row] = field(default_factory=list)  # the first of the answers that the grader could not judge
    num_undecided: int = 0
    _rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._rng.seed(self.seed)

    def add(self, decision: Keep | Drop) -> None:
        if isinstance(decision, Drop):
            if decision.reason == "change_ratio" and decision.measures:
                self.measured.append(decision.measures)
            return
        self.measured.append(decision.measures)
        self.num_kept += 1
        rate = decision.row.get("meta", {}).get("pass_rate")
        if rate is not None:
            self.pass_rates[rate] += 1
        if len(self.samples) < NUM_SAMPLES:  # reservoir sampling: every kept pair is equally likely to be shown
            self.samples.append(decision.row)
        elif (place := self._rng.randrange(self.num_kept)) < NUM_SAMPLES:
            self.samples[place] = decision.row

    def add_rejected(self, path: Path) -> None:
        """Draw from rejected.jsonl of the rectification, if it exists."""
        if not path.is_file():
            return
        for index, (_, row) in enumerate(read_rows(path)):
            if len(self.rejected) < NUM_REJECTED:
                self.rejected.append(row)
            elif (place := self._rng.randrange(index + 1)) < NUM_REJECTED:
                self.rejected[place] = row

    def add_undecided(self, path: Path) -> None:
        """Count undecided.jsonl of the elicitation and keep its first rows, if it exists."""
        if path.is_file():
            for _, row in read_rows(path):
                self.num_undecided += 1
                if self.num_undecided <= NUM_UNDECIDED:
                    self.undecided.append(row)


def write_report(path: Path, data: ReportData, summary: dict[str, Any]) -> None:
    """Render the page. `summary` is the filter's, with the earlier stages' nested under "upstream"."""
    rectify = summary.get("upstream") or {}
    elicit = rectify.get("upstream") or {}
    kept = [measures for measures in data.measured if measures.change_ratio <= data.gamma]
    stages, charts = funnel(elicit, rectify, summary), distributions(data, kept)
    page = render_page(
        Path(__file__).with_name("report.html.j2"),
        [*(chart for chart, _ in stages), *charts],
        summary=summary,
        funnel=stages,
        distributions=charts,
        pass_rates=sorted(data.pass_rates.items()),
        rejected=[{**row, "problem": shown_problem(row)} for row in data.rejected],
        undecided=[{**row, "problem": shown_problem(row)} for row in data.undecided],
        num_undecided=data.num_undecided,
        costs=costs(elicit, rectify, len(kept)),
        samples=[{"row": row, "prompt": prompt_text(row), "sides": row_diff(row)} for row in data.samples],
    )
    write_text(path, page)


def funnel(
    elicit: dict[str, Any], rectify: dict[str, Any], summary: dict[str, Any]
) -> list[tuple[Chart, dict[str, int]]]:
    """A bar for every stage, and the number of rows dropped on the way to it, by reason."""
    stages: list[tuple[str, int, dict[str, int]]] = []

    def stage(name: str, count: int | None, dropped: dict[str, int] | None = None) -> None:
        if count is not None:
            stages.append((name, count, {reason: n for reason, n in (dropped or {}).items() if n}))

    if elicit:
        stage("rows in the question file", elicit["question_rows"])
        stage("questions", elicit["questions"], elicit["questions_dropped"])
        per_question = elicit["samples_per_question"]
        stage(f"sampled answers ({per_question} a question)", elicit["samples"])
        stage(
            "wrong answers",
            elicit["errors"],
            {
                "correct": elicit["correct"],
                "undecided": elicit.get("undecided", 0),
                "pending": elicit["pending"],
                **elicit["excluded"],
            },
        )
    elif rectify:
        stage("wrong answers", rectify["errors"])
    if rectify:
        stage("rectified and verified", rectify["rectified"], rectify["rejected"])
    else:
        stage("rectified answers", summary["rectified"])
    stage("pairs", summary["pairs"], summary["dropped"])
    widest = max(count for _, count, _ in stages) or 1
    return [
        (stacked_bar(name, [(name, count, f"{count:,}")], scale=widest, note=f"{count:,}"), dropped)
        for name, count, dropped in stages
    ]


def distributions(data: ReportData, kept: Sequence[Measures]) -> list[Chart]:
    """Histograms of all measured pairs' change ratio, and of the kept pairs' lengths."""
    shares = [m.shared_prefix_tokens / m.chosen_tokens for m in kept]
    gamma = Level(data.gamma, "γ, dropped above")
    return [
        _histogram("Change ratio R", [m.change_ratio for m in data.measured], 1.0, [gamma]),
        _histogram("Shared prefix, share of chosen", shares, 1.0),
        _histogram("Edited tokens", [m.edited_tokens for m in kept]),
        _histogram("Chosen tokens", [m.chosen_tokens for m in kept]),
        _histogram("Rejected tokens", [m.rejected_tokens for m in kept]),
        _histogram("Prompt tokens", [m.prompt_tokens for m in kept]),
    ]


def _histogram(title: str, values: Sequence[float], high: float | None = None, levels: Sequence[Level] = ()) -> Chart:
    """From 0 to `high`, or to the largest value."""
    note = ""
    if values:
        tenth, nine_tenths = np.quantile(values, (0.1, 0.9))
        note = f"80 % are from {number(tenth)} to {number(nine_tenths)}"
    groups = [Group("pairs", PALETTE[0], values)]
    return histogram(title, groups, low=0.0, high=high, num_bins=NUM_BINS, levels=levels, note=note)


def costs(elicit: dict[str, Any], rectify: dict[str, Any], num_pairs: int) -> list[tuple[str, list[str]]]:
    """Table rows of (stage, [calls, prompt tokens, written tokens, dollars])."""
    table = []
    for name, stage in (("elicit", elicit), ("rectify", rectify)):
        if stage:
            numbers = [f"{stage[key]:,}" for key in ("http_calls", "prompt_tokens", "completion_tokens")]
            table.append((name, [*numbers, f"{stage['cost_usd']:,.2f}" if stage.get("cost_usd") else "-"]))
    if rectify.get("cost_usd") and num_pairs:
        table.append(
            (
                "per pair",
                ["", "", f"{rectify['completion_tokens'] / num_pairs:,.0f}", f"{rectify['cost_usd'] / num_pairs:.4f}"],
            )
        )
    return table


def prompt_text(row: Row) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else transcript(prompt, row.get("tools"))


def row_diff(row: Row) -> dict[str, Markup]:
    """`word_diff` of a line of pairs.jsonl, whose sides are texts or one message each."""
    texts = (row[side] if isinstance(row[side], str) else text_of(row[side][0]) for side in ("rejected", "chosen"))
    return word_diff(*texts)


def word_diff(rejected: str, chosen: str) -> dict[str, Markup]:
    """Both texts as HTML, with the differences in <del> and <ins>, and long common stretches folded."""
    before, after = _words(rejected), _words(chosen)
    sides: dict[str, list[Markup]] = {"rejected": [], "chosen": []}
    blocks = _blocks(before, after)
    for index, (equal, old, new) in enumerate(blocks):
        if equal:
            common = list(_folded(old, first=index == 0, last=index == len(blocks) - 1))
            sides["rejected"] += common
            sides["chosen"] += common
            continue
        if old:
            sides["rejected"].append(Markup("<del>{}</del>").format("".join(old)))
        if new:
            sides["chosen"].append(Markup("<ins>{}</ins>").format("".join(new)))
    return {name: Markup("").join(parts) for name, parts in sides.items()}


def _blocks(before: list[str], after: list[str]) -> list[tuple[bool, list[str], list[str]]]:
    """Alternating (equal, words before, words after); a chance match inside a rewrite counts as rewritten."""
    blocks: list[tuple[bool, list[str], list[str]]] = []
    for block in LCSseq.opcodes(before, after):
        old, new = before[block.src_start : block.src_end], after[block.dest_start : block.dest_end]
        equal = block.tag == "equal" and not (blocks and _is_chance(old, after_rewrite=blocks[-1]))
        if blocks and not equal and not blocks[-1][0]:
            old, new = blocks[-1][1] + old, blocks.pop()[2] + new
        blocks.append((equal, old, new))
    return blocks


def _is_chance(words: list[str], after_rewrite: tuple[bool, list[str], list[str]]) -> bool:
    """Whether equal words that follow a rewrite are only a space, or few after many."""
    was_equal, old, _ = after_rewrite
    return not was_equal and (not "".join(words).strip() or _num_words(words) < STRAY_WORDS <= _num_words(old))


def _num_words(words: list[str]) -> int:
    return sum(word.isalnum() for word in words)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _folded(words: list[str], first: bool, last: bool) -> Iterator[Markup]:
    head, tail = (0 if first else CONTEXT_WORDS), (0 if last else CONTEXT_WORDS)
    if len(words) <= head + tail + CONTEXT_WORDS:
        yield escape("".join(words))
        return
    yield escape("".join(words[:head]))
    hidden = words[head : len(words) - tail]
    count = sum(not word.isspace() for word in hidden)
    yield Markup("<details><summary>{} words unchanged</summary>{}</details>").format(count, "".join(hidden))
    yield escape("".join(words[len(words) - tail :]))
