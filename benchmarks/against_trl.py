"""Trains the same pairs with this project and with TRL, interleaved, and compares their cost.

    python -m benchmarks.against_trl --output benchmarks/results/against_trl.json [--trl 0.20.0] [--repeats 2]

Every measurement is a process of its own on one thread. CPU-seconds are those of all its threads, kernel time included;
memory is its anonymous resident memory, sampled from outside. The losses of all systems are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, make_pairs, write_model, write_pairs
from benchmarks.measure import ENVIRONMENT_FOLDER, ROOT, environment_python, run_worker
from benchmarks.tables import markdown

LAYOUTS = ("shared", "separate")
BATCH_PAIRS = 2
# Largest difference of a step's loss: between the layouts, and to TRL for every 600 tokens of a response. TRL adds
# log-probabilities up in float32, whose steps grow with the sum: 5e-4 at -7000 nats, 2e-3 at -18000.
LAYOUT_TOLERANCE, TRL_TOLERANCE = 1e-5, 1e-4


def measure_case(case: Case, systems: dict[str, dict[str, Any]], options: argparse.Namespace, scratch: Path) -> Any:
    """`repeats` runs of every system, one after the other in turns, the first one rotating."""
    pairs_file = scratch / "pairs.jsonl"
    write_pairs(pairs_file, make_pairs(case))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    names = list(systems)
    for repeat in range(options.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            system, folder = systems[name], scratch / "run"
            shutil.rmtree(folder, ignore_errors=True)
            job = {
                "model": str(scratch / "model"),
                "pairs": str(pairs_file),
                "num_steps": options.steps,
                "batch_pairs": BATCH_PAIRS,
                "pairs_per_microbatch": options.pairs_per_microbatch,
                "output": str(folder / "output"),
                **system["job"],
            }
            result = run_worker(system["python"], system["worker"], job, folder, options.timeout)
            runs[name].append(result)
            seconds = [round(phase["cpu_seconds"], 1) for phase in result["phases"]]
            print(f"{case.name}: {name}: CPU-seconds {seconds}", file=sys.stderr, flush=True)
    return {name: summary(results) for name, results in runs.items()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a system's runs: every step but the first of each run, which allocates; the reference pass; the largest peak.

    "train" is the part after the reference pass, "run" the whole process.
    """
    steps = [phase for result in results for phase in [p for p in result["phases"] if p["name"] == "step"][1:]]
    references = [phase for result in results for phase in result["phases"] if phase["name"] == "reference"]
    all_steps = [phase for result in results for phase in result["phases"] if phase["name"] == "step"]
    losses = [result["losses"] for result in results]
    assert all(max_difference(loss, losses[0]) <= LAYOUT_TOLERANCE for loss in losses), "repeats must agree"
    return {
        "step_cpu_seconds": spread([phase["cpu_seconds"] for phase in steps]),
        "step_wall_seconds": spread([phase["wall_seconds"] for phase in steps]),
        "reference_cpu_seconds": spread([phase["cpu_seconds"] for phase in references]),
        "train_peak_bytes": max(phase["peak_bytes"] for phase in all_steps),
        "run_peak_bytes": max(result["peak_bytes"] for result in results),
        "losses": losses[0],
        "versions": results[0]["versions"],
        "num_parameters": results[0]["num_parameters"],
        **({"tokens": results[0]["tokens"]} if "tokens" in results[0] else {}),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def max_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(ours, theirs, strict=True))


def systems_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By name: the program, its Python, and what its job adds. TRL lost the reward shift of bco_pair in 0.29, so the
    newest one is compared on the objective without it."""
    objective = "spot_bco" if options.trl == "0.20.0" else "spot_bce"
    python = environment_python(f"trl-{options.trl}", options.environments)
    systems: dict[str, dict[str, Any]] = {
        layout: {
            "worker": "benchmarks.our_worker",
            "python": sys.executable,
            "job": {"layout": layout, "objective": objective},
        }
        for layout in LAYOUTS
    }
    systems[f"TRL {options.trl}"] = {"worker": "benchmarks.trl_worker", "python": python, "job": {}}
    return systems


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    for response in options.responses:
        for shared in options.shared:
            yield Case(response, shared, BATCH_PAIRS * options.steps)


def check_losses(case: Case, systems: dict[str, Any]) -> dict[str, float]:
    """Largest difference of a step's loss from the shared layout's, by system; raises where it is too large."""
    ours = systems["shared"]["losses"]
    differences = {name: max_difference(ours, system["losses"]) for name, system in systems.items()}
    for name, difference in differences.items():
        trl_tolerance = TRL_TOLERANCE * max(1.0, case.response / 600)
        allowed, what = (LAYOUT_TOLERANCE, "layouts") if name in LAYOUTS else (trl_tolerance, f"shared and {name}")
        assert difference <= allowed, f"{case.name}: the losses of {what} differ by {difference:.1e}, over {allowed}"
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/against_trl.json")
    parser.add_argument("--trl", choices=["0.20.0", "newest"], default="0.20.0")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENT_FOLDER, help="folder of TRL's packages")
    parser.add_argument("--responses", type=int, nargs="+", default=[600, 1500], help="tokens of a response")
    parser.add_argument("--shared", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="shared fractions")
    parser.add_argument("--steps", type=int, default=3, help="of a run; the first one is not counted")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pairs-per-microbatch", type=int, choices=[1, 2], default=1)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    options = parser.parse_args()
    assert options.steps >= 2, "the first step is not counted"

    systems = systems_of(options)
    report: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread",
        "settings": {
            "batch_pairs": BATCH_PAIRS,
            "pairs_per_microbatch": options.pairs_per_microbatch,
            "steps": options.steps,
            "repeats": options.repeats,
        },
        "trl": options.trl,
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model(scratch / "model")
        for case in cases_of(options):
            measured = measure_case(case, systems, options, scratch)
            differences = check_losses(case, measured)
            size = {"response": case.response, "shared": case.shared, "steps": options.steps}
            report["cases"].append({**size, "loss_differences": differences, "systems": measured})
            options.output.parent.mkdir(parents=True, exist_ok=True)  # after every case: a long run may be stopped
            options.output.write_text(json.dumps(report, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
