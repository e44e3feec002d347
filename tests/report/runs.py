"""Run folders for the report's tests, and a written page as a browser parses it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from bokeh.models import GlyphRenderer
from bokeh.models.annotations import Span

from spot_megatron.report import write_report
from spot_megatron.report.charts import Chart
from spot_megatron.report.page import learning_charts, reference_charts, run_labels, speed_charts
from spot_megatron.report.run import VALIDATION_METRICS, read_run

HOSTILE = "</pre></title><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'{{ 7*7 }}"
RECIPE = {
    "name": "small",
    "output": "runs/small",
    "model": {"hf": "some/model"},
    "objective": {"name": "spot_bco", "beta": 0.1, "shift": {"kind": "ema", "decay": 0.9}},
    "train": {"batch_pairs": 4, "epochs": 3, "max_steps": None},
    "optim": {"lr": 1e-6, "clip_grad_norm": 1.0},
}


def row(step: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl, plausible and different at every step."""
    chosen, rejected = 0.3 * (step - 1), -0.21 * (step - 1)
    return {
        "step": step,
        "loss": 2 * math.log(2) * math.exp(-0.1 * (step - 1)),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": min(1.0, 0.25 * (step - 1)),
        "reward_shift": 0.01 * (step - 1),
        "grad_norm": 3.0 / step,
        "lr": 1e-7 * step,
        "pairs": 4,
        "tokens": 1000 + step,
        "unique_tokens": 700 + step,
        "seconds": 0.5 + 0.125 * step,
        **changes,
    }


def make_run(folder: Path, num_steps: int = 9, recipe: dict[str, Any] | None = None, **rows: dict[str, Any]) -> Path:
    """A run of 11 pairs in batches of 4 over 3 epochs: 9 steps. `rows`: s3={"loss": ...} changes step 3."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row(step, **rows.get(f"s{step}", {}))) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    pairs = [{"id": str(i), "logp_chosen": -10.0 - i, "logp_rejected": -12.0 + i} for i in range(11)]
    (folder / "reference.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def add_validations(run: Path, **settings: Any) -> None:
    """Validations at 0, 4 and 8 of a probe and of held-out pairs, whose loss is lowest at step 4."""
    losses, changes = (1.5, 0.5, 0.75), (0.0, -0.01, -0.2)
    rows = [
        {**dict.fromkeys(VALIDATION_METRICS, 0.0), "step": step, "loss": loss, "probe_change": change}
        for step, loss, change in zip((0, 4, 8), losses, changes, strict=True)
    ]
    rows[2]["warnings"] = ["probe_falls"]
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "validation": settings}, sort_keys=False))


def result(**skills: tuple[int, int]) -> dict[str, Any]:
    """The result that tools.eval prints for one model."""
    scores = {
        name: {"correct": correct, "total": total, "accuracy": correct / total, "cut": 0}
        for name, (correct, total) in skills.items()
    }
    return {"model": "folder", "seconds": 1.0, "skills": scores}


class Page(HTMLParser):
    """A written page as a browser takes it: its elements, and the text of those that a test asks for."""

    def __init__(self, folder: Path, *against: Path) -> None:
        super().__init__()
        self.html = write_report(folder, against).read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def all_text(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def cards(self) -> dict[str, tuple[str, str]]:
        found = re.findall(r'<dt>(.*?)</dt><dd><div class="value">(.*?)</div><small>(.*?)</small>', self.html)
        return {name: (value, note) for name, value, note in found}

    @property
    def checks(self) -> list[tuple[str, str]]:
        return re.findall(r'<li class="(\w+)">(.*?)</li>', self.html)

    def chart(self, title: str) -> str:
        """The HTML of one figure."""
        return next(part for part in self.html.split("<figure>") if f"<figcaption>{title}</figcaption>" in part)

    def values(self, title: str) -> list[tuple[int, list[str]]]:
        """Step and cells of every row of a chart's table."""
        found = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', self.chart(title))
        return [(int(step), re.findall(r"<td>(.*?)</td>", cells)) for step, cells in found]


def charts_of(*folders: Path) -> dict[str, Chart]:
    """The charts of a page by title; their figures are what the page draws."""
    runs = [read_run(folder) for folder in folders]
    labels = run_labels(runs)
    charts = [*learning_charts(runs, labels), *speed_charts(runs, labels), *reference_charts(runs[0])]
    return {chart.title: chart for chart in charts}


def lines(chart: Chart, dimension: str) -> list[float]:
    """Places of the lines that cross a figure: levels have the dimension "width", epochs "height"."""
    assert chart.figure is not None
    return sorted(span.location for span in chart.figure.select(Span) if span.dimension == dimension)


def drawn(chart: Chart, name: str = "curve") -> list[list[tuple[float, float]]]:
    """The points of every curve ("curve", "mean"), or of the marks ("lone", "gap"), as they are drawn."""
    assert chart.figure is not None
    glyphs = [glyph for glyph in chart.figure.renderers if isinstance(glyph, GlyphRenderer)]  # in the order of drawing
    sources = [glyph.data_source.data for glyph in glyphs if glyph.name == name]
    return [list(zip(data["x"], data["y"], strict=True)) for data in sources]


def warnings_of(page: Page) -> str:
    return "\n".join(text for level, text in page.checks if level == "warn")
