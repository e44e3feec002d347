"""All measurements of one GPU in one call, each in a process of its own with its own time limit: `make bench-gpu`.

    python -m benchmarks.gpu_suite [--output FOLDER] [--parts ceilings attention ...]

A part that fails or hangs costs the others nothing. Every part's output stays in FOLDER (benchmarks/results/<gpu>/ by
default), and a table of what came out is printed last. About 6 minutes on an H100. Exit code 1 where a part failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT


@dataclass(frozen=True)
class Part:
    module: str
    arguments: tuple[str, ...]
    seconds: int  # limit

    def command(self, output: Path) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments, "--output", str(output)]


EIGHT = ("--model", "8b", "--layers", "10", "--steps", "5")  # the width of 8B; all 36 layers do not fit with AdamW
PARTS = {
    "ceilings": Part("benchmarks.ceilings", (), 40),
    "attention": Part("benchmarks.attention", ("--responses", "1200", "3000", "5000"), 90),
    "head": Part("benchmarks.head_gpu", (), 60),
    "step_1p7b": Part("benchmarks.gpu", ("--model", "1p7b", "--steps", "5"), 80),
    "step_8b": Part("benchmarks.gpu", EIGHT, 90),
    "step_8b_separate": Part("benchmarks.gpu", (*EIGHT, "--set", "data.layout=separate"), 90),
    "step_8b_recompute": Part(
        "benchmarks.gpu", (*EIGHT, "--set", "memory.recompute=full", "memory.recompute_above_tokens=null"), 90
    ),
    "step_8b_fp8": Part("benchmarks.gpu", (*EIGHT, "--set", "precision.fp8=tensorwise"), 90),
}


def run_part(name: str, part: Part, folder: Path) -> dict[str, Any]:
    """The part's report with `exit_code` and `seconds`; its output is in FOLDER/NAME.txt."""
    start = time.perf_counter()
    output = folder / f"{name}.json"
    output.unlink(missing_ok=True)
    with (folder / f"{name}.txt").open("wb") as log:
        try:
            code = subprocess.run(
                part.command(output), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=part.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    report = json.loads(output.read_text()) if output.exists() else {}
    return {"exit_code": code, "seconds": time.perf_counter() - start, **report}


def findings(name: str, report: dict[str, Any]) -> str:
    """The numbers of a part that matter, in one line."""
    if report["exit_code"]:
        return f"exit code {report['exit_code']}, see {name}.txt"
    if name == "ceilings":
        return f"{report['matrix_tflops']:.0f} TFLOP/s, {report['memory_gb_per_second']:.0f} GB/s"
    if name == "attention":
        best = max(report["results"], key=lambda row: row["tflops"])
        return f"{best['kernel']} {best['tflops']:.0f} TFLOP/s at {best['positions']} positions"
    if name == "head":
        return ", ".join(f"tile {row['tile']}: {row['tflops']:.0f} TFLOP/s" for row in report["results"])
    peak = max(report["peak_bytes"].values())
    off = peak / report["planned_bytes"] - 1
    mfu = report["mfu_on_unique_tokens"]
    return (
        f"{report['step_seconds']['median']:.2f} s, {report['unique_tokens_per_second']:.0f} unique tokens/s, "
        f"MFU {'unknown' if mfu is None else f'{mfu:.1%}'}, {peak / 2**30:.1f} GiB ({off:+.1%} of the plan), "
        f"reference {report['reference_seconds']:.1f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("RecipeError: bench-gpu measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name().replace(" ", "_")
    folder = options.output or ROOT / "benchmarks/results" / gpu
    folder.mkdir(parents=True, exist_ok=True)
    lines, failed = [], 0
    for name in options.parts:
        report = run_part(name, PARTS[name], folder)
        failed += report["exit_code"] != 0
        lines.append(f"{name:<18} {report['seconds']:5.0f} s  {findings(name, report)}")
        print(lines[-1], flush=True)
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
