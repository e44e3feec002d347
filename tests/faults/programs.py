"""The project's programs in forked processes, so that each start costs no imports, and what each of them leaves behind.

Call `preload` first. A process is a session of its own and can be killed with all that it started.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_megatron.errors import CheckpointError, UserError
from spot_megatron.hf.checksums import verify_checksums
from spot_megatron.hf.folder import HFFolder, same_bits
from tests.processes import ROOT

TINY = ROOT / "recipes/assets/qwen3_tiny"
NUM_STEPS, SAVE_EVERY, NUM_PAIRS = 6, 2, 48
SECONDS = 600.0  # before a program counts as hanging: machines under load are slow


def preload() -> None:
    """Imports what the programs import when they start."""
    for name in (
        "transformers.models.qwen3.modeling_qwen3",
        "spot_megatron.train.loop",
        "tools.convert.torch_dist_write",
        "tools.elicit",
        "tools.eval.local",
        "tools.rectify",
    ):
        importlib.import_module(name)


@dataclass
class Process:
    """A forked program and its output."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs. What the program has left running is killed, before its id is free."""
        if self.code is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._end()
        return self.code

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code. Raises TimeoutError, after killing it."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.log} after {seconds:.0f} s:\n{self.output()}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """SIGKILL to the program and all that it started."""
        if self.code is None:
            self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass(frozen=True)
class Program:
    """A program, its arguments, and how its results are compared.

    `results` maps names to values that must be equal whenever the program has finished; `is_sound` raises UserError if
    something incomplete is in the place of a result.
    """

    kind: str
    main: Callable[[], int | None]
    arguments: list[str]
    folder: Path  # of its results
    results: Callable[[Path], dict[str, Any]]
    is_sound: Callable[[Path], None]

    def start(self, log: Path, environment: Mapping[str, str] | None = None, bytes_limit: int | None = None) -> Process:
        """`bytes_limit`: size that no file may exceed (RLIMIT_FSIZE)."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
            return Process(pid, log)
        code = 1
        try:
            os.setsid() if os.getpgrp() != os.getpid() else None
            os.environ.update({"OMP_NUM_THREADS": "1", **(environment or {})})
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            sys.argv = [self.kind, *self.arguments]
            if bytes_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_limit, bytes_limit))
            code = self.main() or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, log: Path, **options: Any) -> tuple[int, str]:
        """(exit code, output)."""
        process = self.start(log, **options)
        return process.wait(), process.output()


def train(output: Path, recipe: Path, num_steps: int = NUM_STEPS, changes: Sequence[str] = ()) -> Program:
    from spot_megatron.train.__main__ import main

    changes = [f"output={output}", f"train.max_steps={num_steps}", *changes]
    arguments = [str(recipe), "--set", *changes]
    return Program("train", lambda: main(arguments), arguments, output, trained, check_run)


def write_recipe(folder: Path) -> Path:
    """A recipe of the tiny model on NUM_PAIRS pairs, with its own copies of both, in `folder`."""
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.jsonl", "README.md"))
    lines = (TINY / "pairs.jsonl").read_text().splitlines(keepends=True)[:NUM_PAIRS]
    (folder / "pairs.jsonl").write_text("".join(lines))
    recipe = {
        "extends": "qwen3_tiny_spot",
        "device": "cpu",
        "model": {"hf": str(folder / "model")},
        "data": {"pairs": str(folder / "pairs.jsonl")},
        "objective": {"name": "spot_bco", "shift": {"kind": "ema", "decay": 0.9}},
        "train": {"batch_pairs": 4},
        "checkpoint": {"every_steps": SAVE_EVERY, "keep": 3},
        "logging": {"tensorboard": False},
        "evaluation": {"questions": None},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return folder / "recipe.yaml"


def trained(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        "reference": (run / "reference.jsonl").read_text(),
        "weights": weights(run / "hf"),
    }


def weights(folder: Path) -> dict[str, Any]:
    hf = HFFolder(folder)
    return {name: hf.read(name) for name in hf.names()}


def check_run(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step_*"):
        check_sums(checkpoint)
    check_sums(run / "hf")
    for path in (run.parent / "reference_cache").glob("*.jsonl"):
        if '{"sha256":' not in path.read_text().splitlines()[-1]:
            raise CheckpointError(f"{path} is half there")


def check_sums(folder: Path) -> None:
    """Raises CheckpointError for a folder that is there and is not whole."""
    if folder.exists():
        if not (folder / "SHA256SUMS").exists():
            raise CheckpointError(f"{folder} has no SHA256SUMS")
        verify_checksums(folder, CheckpointError)


def convert(command: str, source: Path, output: Path, **options: Any) -> Program:
    from tools.convert.__main__ import main

    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [command, "--hf" if command == "import" else "--checkpoint", str(source), "--output", str(output)]
    arguments += [*flags, "--workers", "1"]
    return Program(command, lambda: main(arguments), arguments, output, file_digests, check_sums)


def file_digests(folder: Path) -> dict[str, Any]:
    check_sums(folder)
    # .metadata and common.pt hold ids and dates of their making in some versions; their tensors' files do not
    lines = (line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines())
    return {name: digest for digest, name in lines if not name.endswith((".metadata", "common.pt"))}


def elicit(questions: Path, url: str, output: Path) -> Program:
    from tools.elicit import main

    arguments = ["--questions", str(questions), "--output", str(output), "--base-url", url, "--model", "oracle"]
    arguments += ["--prompt-suffix", "", "--concurrency", "2", "--samples", "2"]
    return Program("elicit", _as_program(main), arguments, output, lambda folder: _rows(folder, ELICITED), check_rows)


def rectify(errors: Path, url: str, output: Path) -> Program:
    from tools.rectify import main

    arguments = ["--errors", str(errors), "--output", str(output), "--base-url", url, "--model", "oracle"]
    arguments += ["--concurrency", "2"]
    return Program("rectify", _as_program(main), arguments, output, lambda folder: _rows(folder, RECTIFIED), check_rows)


ELICITED, RECTIFIED = ("correct", "errors", "excluded"), ("rectified", "rejected")
_TIMED = ("seconds", "latency", "calls", "cost_usd", "created", "time", "usage")


def _as_program(main: Callable[[], None]) -> Callable[[], int | None]:
    def start() -> None:
        from tools.pairs.cli import run_program

        run_program(main)

    return start


def _rows(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for name in names:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{key: value for key, value in row.items() if key not in _TIMED} for row in rows]
    return found


def check_rows(folder: Path) -> None:
    """Raises ValueError for an output file that is cut; a journal may end within a line."""
    for name in (*ELICITED, *RECTIFIED):
        if (folder / f"{name}.jsonl").exists():
            _rows(folder, (name,))


def evaluate(model: Path, questions: Path, output: Path) -> Program:
    """`output` is the log: the program prints its result."""
    from tools.eval.__main__ import main

    arguments = ["--model", str(model), "--questions", str(questions), "--greedy", "--max-new-tokens", "24", "--json"]
    arguments += ["--output", str(output.with_name("evaluation"))]

    def scores(log: Path) -> dict[str, Any]:
        result = json.loads(log.read_text().splitlines()[-1])["model"]
        return {key: value for key, value in result.items() if key != "seconds"}

    return Program("evaluation", lambda: main(arguments), arguments, output, scores, lambda log: None)


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of results that are not equal to the bit."""
    return [
        key
        for key in left.keys() | right.keys()
        if key not in left or key not in right or _differ(left[key], right[key])
    ]


def _differ(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return bool(differing(left, right))
    return not same_bits(left, right) if hasattr(left, "untyped_storage") else left != right


def sound(program: Program) -> str | None:
    """Why something incomplete is in the place of a result, or None."""
    try:
        program.is_sound(program.folder)
    except (UserError, ValueError, OSError) as error:
        return str(error)
    return None
