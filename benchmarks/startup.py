"""Measures the start-up cost of a launch: the tiny recipe with one step, launched twice.

    python -m benchmarks.startup --output benchmarks/results/startup.json

CPU-seconds of the whole command, children included. The second launch finds the reference in its cache, and so is
start-up, reading, one step of a tiny model, checkpoint and export: an upper bound of the start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT

LIMIT_CPU_SECONDS = 15.0


def cpu_seconds(arguments: list[str]) -> tuple[float, str]:
    """(CPU-seconds of `python arguments` and its children, what it printed)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/startup.json")
    options = parser.parse_args()
    report = {"imports": cpu_seconds(["-c", "import spot_megatron.train.loop"])[0]}
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output={folder}/run", "train.max_steps=1", "checkpoint.resume=never"]
        command = ["-m", "spot_megatron.train", "qwen3_tiny_spot", "--set", *settings]
        for launch in ("first launch", "second launch"):
            report[launch], output = cpu_seconds(command)
            print(launch, [line for line in output.splitlines() if line.startswith("reference pass")])
            assert ("read from" in output) == (launch == "second launch"), output
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    assert report["second launch"] < LIMIT_CPU_SECONDS


if __name__ == "__main__":
    main()
