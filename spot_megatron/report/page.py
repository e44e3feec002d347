"""The page of a run: facts and charts of its folder, rendered into run.html.j2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from spot_megatron.errors import CheckpointError
from spot_megatron.files import AtomicWriter
from spot_megatron.report import facts
from spot_megatron.report.charts import Chart, Group, Level, histogram, line_chart, link_steps
from spot_megatron.report.html import render_page
from spot_megatron.report.plot import PALETTE, Curve
from spot_megatron.report.run import Run, read_run

BLUE, ORANGE, GREEN = PALETTE[:3]
NUM_COLORS = 6  # of runs on one chart
MAX_EPOCH_LINES = 12


def write_page(run_folder: Path, against: Sequence[Path] = ()) -> Path:
    """Writes `run_folder`/report.html, with the curves of the runs in `against` on the same axes.

    Returns:
        the page's path. The file is replaced atomically.

    Raises:
        CheckpointError: a folder is not a run, there are too many runs, or the page cannot be written.
    """
    if len(against) >= NUM_COLORS:
        raise CheckpointError(
            f"{1 + len(against)} runs are too many for one chart; give at most {NUM_COLORS - 1} to compare with"
        )
    page = render([read_run(Path(folder)) for folder in (run_folder, *against)])
    path = Path(run_folder) / "report.html"
    try:
        with AtomicWriter(path) as file:
            file.write(page.encode("utf-8", "replace"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error}); make room or allow writing there") from None
    return path


def render(runs: Sequence[Run]) -> str:
    """The page about runs[0], compared with the other runs."""
    run, labels = runs[0], run_labels(runs)
    learning, speed, reference = learning_charts(runs, labels), speed_charts(runs, labels), reference_charts(run)
    link_steps([*learning, *speed])
    return render_page(
        Path(__file__).with_name("run.html.j2"),
        [*learning, *speed, *reference],
        run=run,
        title=page_title(run, labels),
        labels=labels,
        headline=facts.headline_table(runs),
        checks=[(label, check) for label, each in zip(labels, runs, strict=True) for check in facts.checks(each)],
        skills=facts.skill_table(runs),
        learning=learning,
        speed=speed,
        reference=reference,
        differences=facts.recipe_differences(runs),
        environment=[(key, facts.plain(value)) for key, value in run.environment.items()],
        summary=summary(run),
    )


def page_title(run: Run, labels: Sequence[str]) -> str:
    """The recipe's name, or the labels of several runs."""
    if len(labels) > 1:
        return f"{labels[0]} against {', '.join(labels[1:])}"
    return facts.plain(run.settings.get("name", labels[0]))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The folders' names; whole paths where two are the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def summary(run: Run) -> str:
    """Objective, hyperparameters and device in one line."""
    keys = {
        "objective.name": "{}",
        "objective.beta": "β {}",
        "optim.lr": "lr {}",
        "train.batch_pairs": "{} pairs a step",
        "model.hf": "model {}",
    }
    parts = [text.format(facts.plain(run.settings[key])) for key, text in keys.items() if key in run.settings]
    if "device" in run.environment:
        parts.append(f"{facts.plain(run.environment.get('processes', 1))} × {facts.plain(run.environment['device'])}")
    return " · ".join(parts)


def learning_charts(runs: Sequence[Run], labels: Sequence[str]) -> list[Chart]:
    """Loss, rewards and gradient."""
    ends = epoch_ends(runs[0]) if len(runs) == 1 else []
    at_reference = dict.fromkeys(filter(None, map(facts.loss_at_reference, runs)))
    clips = dict.fromkeys(clip for run in runs if (clip := _positive(run, "optim.clip_grad_norm")))
    shift = runs[0].settings.get("objective.shift.kind")

    def plot(title: str, curves: list[Curve], **options: object) -> Chart:
        return line_chart(title, curves, epoch_ends=ends, smooth=True, **options)  # type: ignore[arg-type]

    charts = [
        plot(
            "Loss",
            [*_curves(runs, labels, "loss"), *_validation_curves(runs, labels, "loss")],
            levels=[Level(value, f"at the reference, {name}") for value, name in at_reference],
            log_if_wide=True,
        ),
        plot("Reward, chosen and rejected", _reward_curves(runs, labels)),
        *(
            plot(title, [*_curves(runs, labels, key), *_validation_curves(runs, labels, key)], **options)
            for title, key, options in (
                ("Reward margin", "reward_margin", {}),
                ("Reward accuracy", "reward_accuracy", {"low": 0, "high": 1}),
            )
        ),
        line_chart(
            "Reward shift δ",
            _curves(runs, labels, "reward_shift"),
            epoch_ends=ends,
            note=f"objective.shift.kind: {shift}" if shift and len(runs) == 1 else "",
        ),
        plot(
            "Gradient norm before clipping",
            _curves(runs, labels, "grad_norm"),
            levels=[Level(clip, "clip") for clip in clips],
            log_if_wide=True,
        ),
    ]
    probe = _validation_curves(runs, labels, "probe_change")
    title = "Probe: change of the log-probability of texts to keep, nats a token"
    return [*charts, plot(title, probe, levels=[Level(0.0, "the initial model")])] if probe else charts


def speed_charts(runs: Sequence[Run], labels: Sequence[str]) -> list[Chart]:
    def tokens_per_second(run: Run) -> list[float]:
        pairs = zip(run.metrics["unique_tokens"], run.metrics["seconds"], strict=True)
        return [unique / seconds if seconds > 0 else math.nan for unique, seconds in pairs]

    return [
        line_chart("Learning rate", _curves(runs, labels, "lr"), low=0),
        line_chart("Seconds a step", _curves(runs, labels, "seconds"), low=0, smooth=True),
        line_chart("Unique tokens/s", _curves(runs, labels, "rate", tokens_per_second), low=0, smooth=True),
    ]


def reference_charts(run: Run) -> list[Chart]:
    """Log-probabilities of the pairs under the reference model."""
    if not run.reference:
        return []
    chosen, rejected = zip(*run.reference, strict=True)
    prefers = sum(c > r for c, r in run.reference) / len(run.reference)
    difference = [c - r for c, r in run.reference]
    return [
        histogram(
            "Pairs by log-probability, in nats", [Group("chosen", GREEN, chosen), Group("rejected", ORANGE, rejected)]
        ),
        histogram(
            "Pairs by chosen minus rejected, in nats",
            [Group("difference", BLUE, difference)],
            note=f"chosen is the likelier response in {prefers:.1%} of the pairs",
        ),
    ]


def epoch_ends(run: Run) -> list[float]:
    """Positions on the step axis between the epochs."""
    if not run.steps_per_epoch or not run.steps:
        return []
    ends = [step + 0.5 for step in range(run.steps_per_epoch, run.steps[-1], run.steps_per_epoch)]
    return ends if len(ends) <= MAX_EPOCH_LINES else []


def _curves(
    runs: Sequence[Run], labels: Sequence[str], key: str, values: Callable[[Run], list[float]] | None = None
) -> list[Curve]:
    """One curve a run."""
    return [
        Curve(label if len(runs) > 1 else "last", color, run.steps, values(run) if values else run.metrics[key])
        for color, run, label in zip(PALETTE, runs, labels, strict=False)
    ]


def _validation_curves(runs: Sequence[Run], labels: Sequence[str], key: str) -> list[Curve]:
    """One dashed curve for each run with validations that have `key`; with several runs in the run's colour."""
    return [
        Curve(
            f"{label}, validation" if len(runs) > 1 else "validation",
            color if len(runs) > 1 else ORANGE,
            run.validation_steps,
            run.validation[key],
            dashed=True,
        )
        for color, run, label in zip(PALETTE, runs, labels, strict=False)
        if key in run.validation
    ]


def _reward_curves(runs: Sequence[Run], labels: Sequence[str]) -> list[Curve]:
    """A colour a side; with several runs a colour a run, and rejected is dashed."""
    if len(runs) == 1:
        metrics, steps = runs[0].metrics, runs[0].steps
        return [
            Curve("chosen", GREEN, steps, metrics["reward_chosen"]),
            Curve("rejected", ORANGE, steps, metrics["reward_rejected"]),
        ]
    return [
        Curve(f"{label}, {side}", color, run.steps, run.metrics[f"reward_{side}"], dashed=side == "rejected")
        for color, run, label in zip(PALETTE, runs, labels, strict=False)
        for side in ("chosen", "rejected")
    ]


def _positive(run: Run, key: str) -> float | None:
    value = run.settings.get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None
