"""report.html, the page of a run. It needs neither torch nor Megatron-Core to be written, nor a network to be read."""

from collections.abc import Sequence
from pathlib import Path


def write_report(run_folder: Path, against: Sequence[Path] = ()) -> Path:
    """Writes `run_folder`/report.html; see report/page.py.

    Bokeh is imported here and not before: the trainer imports this package long before it writes a report.
    """
    from spot_megatron.report.page import write_page

    return write_page(run_folder, against)


__all__ = ["write_report"]
