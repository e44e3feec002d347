"""Runs a measured process and samples its anonymous memory from outside; environments for other trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT_FOLDER = ROOT / ".venv-benchmarks"
SAMPLE_SECONDS = 0.005


def run_worker(python: Path | str, module: str, job: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Runs `python -m module job.json` in the repository on one thread, and adds its measured memory.

    Returns:
        the worker's result, each phase with `peak_bytes`, the largest anonymous resident memory (RssAnon) in it, and
        `peak_bytes` over the whole life of the process.

    Raises:
        RuntimeError: the worker failed or took longer than `timeout` seconds; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {**job, "result": str(folder / "result.json")}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(python), "-m", module, str(folder / "job.json")],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            samples = _sample(process, timeout)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{module} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    result = json.loads(Path(job["result"]).read_text())
    for phase in result["phases"]:
        phase["peak_bytes"] = max((b for t, b in samples if phase["start"] <= t <= phase["end"]), default=0)
        del phase["start"], phase["end"]
    return {**result, "peak_bytes": max(b for _, b in samples)}


def _sample(process: subprocess.Popen[bytes], timeout: float) -> list[tuple[float, int]]:
    """(monotonic time, RssAnon in bytes) until the process ends."""
    status = Path(f"/proc/{process.pid}/status")
    samples: list[tuple[float, int]] = []
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        try:
            samples.append((time.monotonic(), anonymous_bytes(status.read_text())))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(SAMPLE_SECONDS)
    if process.poll() is None and time.monotonic() >= end:
        raise RuntimeError(f"the worker took longer than {timeout:.0f} s")
    process.wait()
    return samples


def anonymous_bytes(status: str) -> int:
    """RssAnon of the text of /proc/PID/status; 0 for a process that has just ended."""
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else 0


# Other programs, each in packages of its own time; a newer transformers does not run with any of the old ones.
ENVIRONMENTS = {
    "trl-0.20.0": ["trl==0.20.0", "transformers==4.53.3", "accelerate==1.10.1", "datasets==4.0.0", "setuptools"],
    "trl-newest": ["trl", "setuptools"],
    "mbridge-0.15.1": ["mbridge==0.15.1", "megatron-core==0.16.1", "transformers==4.57.6", "psutil", "einops"],
}


def environment_python(name: str, folder: Path) -> Path:
    """Python of one of ENVIRONMENTS, made once under `folder`, with this environment's torch: all run the same
    kernels."""
    python = folder / name / "bin" / "python"
    ready = python.parent.parent / ".ready"
    if ready.exists():
        return python
    venv.create(python.parent.parent, with_pip=True, clear=True)
    torch_version = version("torch").split("+")[0]
    for batch in ([f"torch=={torch_version}"], ENVIRONMENTS[name]):
        print(f"{python} -m pip install {' '.join(batch)}", file=sys.stderr, flush=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *batch], check=True)
    ready.touch()
    return python
