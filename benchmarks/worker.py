"""Job and result files between a measured process and the program that started it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Stopwatch:
    """Phases and steps of one process: CPU-seconds of all its threads, wall seconds, and when they ran.

    The times let the parent, which samples this process's memory from outside, say which phase a peak belongs to.
    """

    def __init__(self) -> None:
        self.phases: list[dict[str, Any]] = []

    def start(self, name: str) -> None:
        self.phases.append({"name": name, "start": time.monotonic(), "cpu": time.process_time()})

    def stop(self) -> None:
        phase = self.phases[-1]
        phase["end"] = time.monotonic()
        phase["cpu_seconds"] = time.process_time() - phase.pop("cpu")
        phase["wall_seconds"] = phase["end"] - phase["start"]


def read_job() -> dict[str, Any]:
    """The job file named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text())


def write_result(job: dict[str, Any], watch: Stopwatch, losses: list[float], **more: Any) -> None:
    Path(job["result"]).write_text(json.dumps({"phases": watch.phases, "losses": losses, **more}))
