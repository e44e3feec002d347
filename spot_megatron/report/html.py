"""One self-contained HTML file out of a template and charts.

The page runs two scripts, BokehJS and the one that draws the charts. Its content security policy names both by their
digest and allows nothing else, so text that gets past the templates' escaping cannot run, and nothing is loaded.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from bokeh.embed import components
from bokeh.resources import Resources
from markupsafe import Markup

from spot_megatron.report.charts import Chart

TEMPLATES = Path(__file__).parent


def render_page(template: Path, charts: Sequence[Chart], **values: object) -> str:
    """Renders a template that extends base.html.j2. It gets `values`, and shows each of `charts` by its macros."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    figures = [chart.figure for chart in charts if chart.figure is not None]
    scripts, plots = [], {}
    if figures:
        draw, divisions = components(figures, wrap_script=False)
        plots = {figure.id: Markup(division) for figure, division in zip(figures, divisions, strict=True)}
        scripts = [*Resources(mode="inline", components=["bokeh"]).js_raw, draw]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    environment.globals |= {
        "policy": Markup(f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"),
        "plots": plots,
        "scripts": [Markup(script) for script in scripts],
    }
    return environment.get_template(template.name).render(values)
