"""Markdown tables of the results."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def markdown(report: dict[str, Any]) -> str:
    """The comparison with TRL: a row for each size and system, ratios to TRL of the same size."""
    trl = f"TRL {report['trl']}"
    settings = report["settings"]
    lines = [
        f"{settings['batch_pairs']} pairs a step, {settings['pairs_per_microbatch']} a micro-batch; "
        f"{report['machine']}.",
        "CPU-seconds: median (min to max) of the steps after the first. With reference: a step and its share of the "
        "reference pass, as in a run of one epoch. Peak: anonymous memory, GiB. x: ratio to TRL.",
        "",
        "| response | shared | system | CPU-s a step | x | wall s a step | with reference | x | peak in training | x "
        "| peak of the run | x | tokens | unique | loss off shared |",
        "|" + "---|" * 15,
    ]
    for case in report["cases"]:
        base = case["systems"][trl]
        for name, system in case["systems"].items():
            tokens = system.get("tokens", [["", ""]])[0]
            cells = [
                str(case["response"]),
                f"{case['shared']:g}",
                name,
                _spread(system["step_cpu_seconds"]),
                _ratio(system, base, "step_cpu_seconds"),
                _spread(system["step_wall_seconds"]),
                f"{_with_reference(system, case):.1f}",
                f"{_with_reference(system, case) / _with_reference(base, case):.2f}",
                f"{system['train_peak_bytes'] / GIB:.2f}",
                f"{system['train_peak_bytes'] / base['train_peak_bytes']:.2f}",
                f"{system['run_peak_bytes'] / GIB:.2f}",
                f"{system['run_peak_bytes'] / base['run_peak_bytes']:.2f}",
                str(tokens[0]),
                str(tokens[1]),
                f"{case['loss_differences'][name]:.0e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['min']:.1f} to {values['max']:.1f})"


def _with_reference(system: dict[str, Any], case: dict[str, Any]) -> float:
    """CPU-seconds of a step with its part of the reference pass, which runs once over all pairs of the run."""
    share = system["reference_cpu_seconds"]["median"] / case["steps"]
    return float(system["step_cpu_seconds"]["median"] + share)


def _ratio(system: dict[str, Any], base: dict[str, Any], key: str) -> str:
    return f"{system[key]['median'] / base[key]['median']:.2f}"
