"""`python -m tools.reproduce RUN [--output DIR]`: trains a finished run again and compares both.

The recipe, the number of processes and the first date are those of RUN; the reference log-probabilities are computed
anew. Prints whether metrics and weights are the same to the bit, the first step and the tensors that differ, and what
differs in the environment, the pairs or the initial weights. Exit codes: 0 the same, 1 not, 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spot_megatron.errors import EXIT_DONE, EXIT_FAILURE, CheckpointError, UserError, print_error
from spot_megatron.files import Row, read_rows, write_json
from spot_megatron.recipe import Logging, load_recipe
from tools import launch
from tools.convert.compare import differences, report

TIMES = ("seconds",)  # keys of metrics.jsonl that no run repeats


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reproduce", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--output", type=Path, help="folder for the new run; default: RUN.reproduced")
    options = parser.parse_args(arguments)
    run: Path = options.run
    try:
        again = train_again(run, options.output or run.with_name(f"{run.name}.reproduced"))
        if isinstance(again, int):
            return again
        lines = compare_metrics(run, again) + compare_weights(run, again)
    except UserError as error:
        return print_error(error)
    print("\n".join(lines) if lines else f"{again} repeats {run}: metrics and weights are the same, bit for bit")
    for line in compare_inputs(run, again) if lines else []:
        print(line)
    return EXIT_FAILURE if lines else EXIT_DONE


def train_again(run: Path, folder: Path) -> Path | int:
    """The new run's folder, or the exit code of a training that did not end well."""
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "hf/config.json"):
        if not (run / name).is_file():
            raise CheckpointError(f"{run} is not a finished run: {name} is missing; name the `output` of one")
    environment = read_object(run / "environment.json")
    again = folder / run.name  # the reference cache lies beside a run: this one gets its own
    if not (again / "environment.json").exists():
        write_json(again / "environment.json", {"started": environment.get("started")})
    recipe = str(run / "recipe.yaml")
    silent = ["evaluation.questions=null", *(f"logging.{name}=false" for name in Logging.model_fields)]
    changes = [f"output={again}", "checkpoint.resume=auto", *silent]
    load_recipe(recipe, changes)
    processes = environment.get("processes")
    code = launch.main([recipe, "--set", *changes, *(["--processes", str(processes)] if processes else [])])
    return again if code == EXIT_DONE else code


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore it") from None
    return value if isinstance(value, dict) else {}


def compare_metrics(run: Path, again: Path) -> list[str]:
    """The first step whose row differs, with both values."""
    first, second = ([row for _, row in read_rows(folder / "metrics.jsonl")] for folder in (run, again))
    lines = [] if len(first) == len(second) else [f"metrics.jsonl: {len(first)} steps then, {len(second)} now"]
    for before, now in zip(first, second, strict=False):
        changed = [key for key in before.keys() | now.keys() if key not in TIMES and before.get(key) != now.get(key)]
        if changed:
            texts = (f"{key} {before.get(key)} then, {now.get(key)} now" for key in sorted(changed))
            return [*lines, f"metrics.jsonl: step {before.get('step')}: {'; '.join(texts)}"]
    return lines


def compare_weights(run: Path, again: Path) -> list[str]:
    found = differences(run / "hf", again / "hf")
    return report(found) if found else []


def compare_inputs(run: Path, again: Path) -> list[str]:
    """What may be the cause: versions, hardware, and the digests of pairs and initial weights."""
    before, now = (_flat(read_object(folder / "environment.json")) | _digests(folder) for folder in (run, again))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    lines = [f"{key}: {before.get(key)} then, {now.get(key)} now" for key in keys]
    return lines or ["the environment, the pairs and the initial weights are the same as then"]


def _flat(value: Row) -> dict[str, Any]:
    return value.get("packages", {}) | {key: item for key, item in value.items() if key != "packages"}


def _digests(run: Path) -> dict[str, Any]:
    states = [*sorted((run / "checkpoints").glob("step_*/state.json")), *run.glob("finished.json")]
    identity = read_object(states[-1]).get("recipe", {}) if states else {}
    return {key: value for key, value in identity.items() if key.startswith("digest of")}


if __name__ == "__main__":
    sys.exit(main())
