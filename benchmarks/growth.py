"""Measures how a step's memory and time grow with the response length, and compares them with the sampler's cost model.

    python -m benchmarks.growth --output benchmarks/results/growth.json

One pair a step, shared fraction 0.5, the model of cases.py; one process a length, on one thread. Memory above what the
process holds after its first step (weights, gradients, AdamW) is fitted by a straight line in the rows of the pack,
CPU-seconds by a constant (the update, which no pair pays for) plus the pair's cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, make_pairs, write_model, write_pairs
from benchmarks.measure import ROOT, run_worker
from benchmarks.tables import GIB
from spot_megatron.data.costs import cost_model
from spot_megatron.data.pack import num_targets, positions_and_products
from spot_megatron.data.records import TokenPair
from spot_megatron.hf.config import read_hf_config


def measure(response: int, shared: float, steps: int, scratch: Path) -> dict[str, Any]:
    raw = make_pairs(Case(response, shared, steps))
    write_pairs(scratch / "pairs.jsonl", raw)
    job = {
        "model": str(scratch / "model"),
        "pairs": str(scratch / "pairs.jsonl"),
        "num_steps": steps,
        "batch_pairs": 1,
        "pairs_per_microbatch": 1,
        "layout": "shared",
        "objective": "spot_bce",
        "output": str(scratch / f"{response}" / "output"),
    }
    result = run_worker(sys.executable, "benchmarks.our_worker", job, scratch / f"{response}", timeout=7200)
    sides = (np.array(raw[0][f"{name}_ids"], dtype=np.int32) for name in ("prompt", "chosen", "rejected"))
    pair = TokenPair("pair", *sides, source="simulated")
    rows, products = positions_and_products(pair, "shared")
    model = cost_model(read_hf_config(scratch / "model"))
    later = [phase for phase in result["phases"] if phase["name"] == "step"][1:]
    return {
        "response": response,
        "rows": rows,
        "cost": model.of(rows, products, num_targets(pair, "shared")),
        "share_of_products": model.product * products / model.of(rows, products, num_targets(pair, "shared")),
        "cpu_seconds": min(phase["cpu_seconds"] for phase in later),
        "peak_bytes": max(phase["peak_bytes"] for phase in later),
    }


def line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Intercept and slope that minimise the relative errors of y."""
    matrix = np.stack([np.ones(len(x)), np.array(x)], axis=1) / np.array(y)[:, None]
    intercept, slope = np.linalg.lstsq(matrix, np.ones(len(x)), rcond=None)[0]
    return float(intercept), float(slope)


def with_fits(points: list[dict[str, Any]]) -> dict[str, Any]:
    base, per_row = line([p["rows"] for p in points], [p["peak_bytes"] for p in points])
    constant, per_cost = line([p["cost"] for p in points], [p["cpu_seconds"] for p in points])
    for point in points:
        point["memory_error"] = point["peak_bytes"] / (base + per_row * point["rows"]) - 1
        point["time_error"] = point["cpu_seconds"] / (constant + per_cost * point["cost"]) - 1
    return {
        "memory": {"base_bytes": base, "bytes_per_row": per_row},
        "time": {"constant_seconds": constant, "seconds_per_cost": per_cost},
        "points": points,
    }


def table(report: dict[str, Any]) -> str:
    memory, time = report["memory"], report["time"]
    lines = [
        f"peak = {memory['base_bytes'] / GIB:.2f} GiB + {memory['bytes_per_row'] / 2**10:.0f} KiB a row; "
        f"CPU-seconds = {time['constant_seconds']:.2f} + {1000 * time['seconds_per_cost']:.3f} ms x cost",
        "",
        "| response | rows | cost | of it attention | CPU-s a step | off the fit | peak GiB | off the fit |",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| {p['response']} | {p['rows']} | {p['cost']:.0f} | {p['share_of_products']:.0%} | {p['cpu_seconds']:.1f} "
        f"| {p['time_error']:+.1%} | {p['peak_bytes'] / GIB:.2f} | {p['memory_error']:+.1%} |"
        for p in report["points"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/growth.json")
    parser.add_argument("--responses", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--shared", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=2, help="of a run; the first one is not counted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model(scratch / "model")
        points = []
        for response in options.responses:
            points.append(measure(response, options.shared, options.steps, scratch))
            print(points[-1], flush=True)
    report = with_fits(points)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
