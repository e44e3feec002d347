"""`python -m benchmarks.convert`: a random Qwen3 of 1.08 B parameters, against a kernel copy, transformers and mbridge.

Prints a Markdown table. The programs are interleaved and each run is a process of its own. The smallest CPU time of
several runs is reported, because wall time is unreliable on a shared machine. Memory is the sum over all processes of a
program.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.measure import ENVIRONMENT_FOLDER, ROOT, environment_python

MAKE_MODEL = """
import sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = Qwen3Config(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=9,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="450MB")
"""
COPY = """
import os, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
for file in source.iterdir():
    with file.open("rb") as read, (target / file.name).open("wb") as write:
        size = at = file.stat().st_size
        while at:
            at -= os.sendfile(write.fileno(), read.fileno(), size - at, at)
        os.fsync(write.fileno())
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    """Of a program and its children: seconds of wall and CPU time, peak bytes, bytes read and written."""

    wall: float
    cpu: float
    anonymous: float
    moved: float


def measure(command: list[str]) -> Cost:
    """Runs the program, sampling its processes every 10 ms."""
    start = time.perf_counter()
    before = os.times()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous, moved = 0, 0
    while process.poll() is None:
        total = transferred = 0
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in family:
            try:
                lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
                counters = Path(f"/proc/{member.pid}/io").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            transferred += sum(int(line.split()[1]) for line in counters if line.startswith(("rchar", "wchar")))
        anonymous = max(anonymous, total)
        moved = max(moved, transferred)  # a process that has ended is counted by its parent from then on
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{command} failed")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(time.perf_counter() - start, cpu, anonymous, moved)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work (7 GB; default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENT_FOLDER, help="folder of mbridge's packages")
    options = parser.parse_args()
    mbridge = environment_python("mbridge-0.15.1", options.environments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base = Path(name)
        source, checkpoint, copy = base / "model", base / "checkpoint", base / "copy"
        subprocess.run([sys.executable, "-c", MAKE_MODEL, source], check=True, capture_output=True)
        weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        convert = [sys.executable, "-m", "tools.convert"]
        programs = {
            "kernel copy (sendfile, fsync)": [sys.executable, "-c", COPY, source, copy],
            "import torch, nothing else": [sys.executable, "-c", "import torch"],
            "tools.convert import, 2 processes": [*convert, "import", "--hf", source, "--output", checkpoint],
            "tools.convert export, 2 processes": [*convert, "export", "--checkpoint", checkpoint, "--output", copy],
            "transformers load + save": [sys.executable, "-c", TRANSFORMERS, source, copy],
            "mbridge 0.15.1 (patched) load + save": [mbridge, ROOT / "benchmarks" / "mbridge_worker.py", source, copy],
        }
        costs: dict[str, list[Cost]] = {}
        for _ in range(options.repeats):
            shutil.rmtree(checkpoint, ignore_errors=True)
            for program, command in programs.items():
                shutil.rmtree(copy, ignore_errors=True)
                os.sync()
                workers = ["--workers", "2"] if "tools.convert" in command else []
                costs.setdefault(program, []).append(measure([str(part) for part in [*command, *workers]]))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
    )
    print(f"{weights / 1e9:.3f} GB of weights; best of {options.repeats} runs each.\n")
    print("| program | CPU s | wall s, best..worst | peak anonymous memory MB | bytes moved / file bytes |")
    print("|---|---|---|---|---|")
    for program, runs in costs.items():
        walls = sorted(run.wall for run in runs)
        anonymous, moved = max(run.anonymous for run in runs) / 1e6, min(run.moved for run in runs) / weights
        cpu = min(run.cpu for run in runs)
        print(f"| {program} | {cpu:.1f} | {walls[0]:.1f}..{walls[-1]:.1f} | {anonymous:.0f} | {moved:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
