"""Facts of a run as text: headline, checks, held-out accuracy, differences between recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any, Literal

from spot_megatron.objective.values import VALUE_AT_REFERENCE
from spot_megatron.report.numbers import number
from spot_megatron.report.run import Run, Score

# Named warnings of train/watch.py, explained.
WARNINGS = {
    "loss_spike": ": the loss was far above that of the steps before; if it recurs, lower optim.lr",
    "probe_falls": ": the texts to keep became less likely while the margin grew, so the model forgets",
    "chosen_falls": ": the chosen reward fell while the margin grew, so both responses became less likely",
}
LAST = 10  # steps that a "mean of the last" is taken over
FIRST_LOSS_TOLERANCE = 0.01  # relative; the run's own gate is finer, this catches a file of another run


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Check:
    level: Literal["good", "note", "warn"]
    text: str


@dataclass(frozen=True)
class SkillRow:
    """Accuracies in percent; `cells` are (percent, counts) for the base and each run, None where a run has none."""

    skill: str
    cells: list[tuple[str, str] | None]
    difference: str
    interval: str
    settled: bool  # the interval excludes 0


def headline_table(runs: Sequence[Run]) -> list[list[Fact]]:
    """A row for each fact, a column for each run; "-" if a run lacks the fact."""
    columns = [{fact.name: fact for fact in headline(run)} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[column.get(name, Fact(name, "-")) for column in columns] for name in names]


def headline(run: Run) -> list[Fact]:
    """The numbers at the top of the page."""
    planned = f" of {run.planned_steps}" if run.planned_steps else ""
    epochs = run.settings.get("train.epochs", "?")
    data = f"{len(run.reference):,} pairs, {epochs} epochs planned" if run.reference else "number of pairs unknown"
    facts = [Fact("steps", f"{len(run.steps)}{planned}", data), *_dropped(run)]
    if run.skills:
        facts.append(_held_out(run))
    if not run.steps:
        return facts
    loss, margin, accuracy = (run.metrics[key] for key in ("loss", "reward_margin", "reward_accuracy"))
    num_last = min(LAST, len(run.steps))
    last = f"last {_steps(num_last)}: mean "
    facts += [
        Fact("final loss", number(loss[-1]), f"first {number(loss[0])}; {last}{number(_mean(loss[-num_last:]))}"),
        Fact("reward margin", _change(margin), last + number(_mean(margin[-num_last:]))),
        Fact("reward accuracy", _change(accuracy), last + number(_mean(accuracy[-num_last:]))),
    ]
    facts += _validation(run)
    tokens, unique, seconds = (_total(run.metrics[key]) for key in ("tokens", "unique_tokens", "seconds"))
    saved = f"{1 - unique / tokens:.1%}" if tokens else "unknown"
    rate = number(unique / seconds) if seconds else "unknown"
    as_separate = f"; {number(tokens / seconds)} as separate sequences" if seconds and tokens else ""
    typical = [value for value in run.metrics["seconds"] if math.isfinite(value)]
    median_step = f"; median step {number(median(typical))} s" if typical else ""
    return [
        *facts,
        Fact("saved by prefix sharing", saved, f"{tokens:,.0f} tokens, {unique:,.0f} of them computed (unique)"),
        Fact("seconds", number(seconds), f"{timedelta(seconds=round(seconds))}{median_step}"),
        Fact("unique tokens/s", rate, f"training steps alone{as_separate}"),
    ]


def _validation(run: Run) -> list[Fact]:
    """First and last validation, and the step that was exported as the best."""
    found = []
    if "loss" in run.validation:
        accuracy = run.validation["reward_accuracy"][-1]
        note = f"margin {_change(run.validation['reward_margin'])}, accuracy {number(accuracy)}"
        found.append(Fact("validation loss", _change(run.validation["loss"]), note))
    if "probe_change" in run.validation:
        note = "nats a token that the texts to keep gained or lost since the start"
        found.append(Fact("probe", number(run.validation["probe_change"][-1]), note))
    if run.best_step is not None:
        note = f"validation.keep_best: {plain(run.settings.get('validation.keep_best'))}; the step that is exported"
        found.append(Fact("best step", str(run.best_step), note))
    return found


def _dropped(run: Run) -> list[Fact]:
    """How many of the files' pairs were left out, and why: every one of them has a counted reason."""
    if run.dropped is None:
        return []
    num_dropped = sum(run.dropped.values())
    of_all = f" of {num_dropped + len(run.reference):,}" if run.reference else ""
    reasons = sorted(run.dropped.items(), key=lambda item: -item[1])
    note = ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "all pairs in the files are trained on"
    return [Fact("pairs dropped", f"{num_dropped:,}{of_all}", note)]


def checks(run: Run) -> list[Check]:
    """Warnings, then passed checks, then notes."""
    found = [_progress(run)]
    found += _first_loss(run)
    found += _not_finite(run)
    found += _clipping(run)
    found += [
        Check("warn", f"{plain(name)} in {_steps(len(steps))} (first: step {steps[0]})" + WARNINGS.get(name, ""))
        for name, steps in run.warnings.items()
    ]
    chosen = run.metrics["reward_chosen"][-LAST:]
    if chosen and _mean(chosen) < 0:
        text = f"mean chosen reward of the last {_steps(len(chosen))} is {number(_mean(chosen))}: "
        found.append(Check("warn", text + "the model has become less likely to give the chosen responses than it was"))
    questions = run.settings.get("evaluation.questions")
    if questions is not None and not run.skills:
        found.append(Check("note", f"no held-out accuracy: evaluation.json has no answers to {plain(questions)} yet"))
    found += [Check("note", problem) for problem in run.problems]
    return sorted(found, key=lambda check: ("warn", "good", "note").index(check.level))


def loss_at_reference(run: Run) -> tuple[float, str] | None:
    if run.settings.get("objective.sft_weight"):
        return None  # the NLL of the chosen side depends on the model
    return VALUE_AT_REFERENCE.get(str(run.settings.get("objective.name")))


def skill_table(runs: Sequence[Run]) -> list[SkillRow]:
    """Held-out accuracy by skill: base first, then every run. The difference is the first run's to its base."""
    skills = list(dict.fromkeys(skill for run in runs for skill in run.skills))
    columns = [runs[0].base_skills, *(run.skills for run in runs)]
    if len(skills) > 1:
        everything = f"all {len(skills)}"
        columns = [
            {**column, everything: sum(column.values(), Score(0, 0))} if set(skills) <= set(column) else column
            for column in columns
        ]
        skills.append(everything)
    return [_skill_row(skill, [column.get(skill) for column in columns]) for skill in skills]


def difference_interval(before: Score, after: Score) -> tuple[float, float]:
    """95 % interval of the change of a share between two independent samples (Newcombe 1998, method 10)."""
    p1, p2 = before.correct / before.total, after.correct / after.total
    (low1, high1), (low2, high2) = _wilson(before), _wilson(after)
    change = p2 - p1
    return change - math.hypot(p2 - low2, high1 - p1), change + math.hypot(high2 - p2, p1 - low1)


def recipe_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, each run's value) whose values differ between runs, except name and output."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in ("name", "output")))
    table = [(key, [plain(run.settings[key]) if key in run.settings else "-" for run in runs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def plain(value: Any) -> str:
    """A setting as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _progress(run: Run) -> Check:
    if not run.steps:
        return Check("warn", "no step was finished")
    if run.planned_steps is None:
        return Check("note", f"{_steps(len(run.steps))} finished; the number of planned steps is unknown")
    if run.steps[-1] < run.planned_steps and _out_of_patience(run):
        return Check("good", f"ended after step {run.steps[-1]} of {run.planned_steps} by validation.patience")
    if run.steps[-1] < run.planned_steps:
        return Check("warn", f"step {run.steps[-1]} of {run.planned_steps}: stopped early, or still running")
    return Check("good", f"all {run.planned_steps} steps finished")


def _out_of_patience(run: Run) -> bool:
    patience, best = run.settings.get("validation.patience"), run.best_step
    if type(patience) is not int or best is None:
        return False
    return sum(best < step <= run.steps[-1] for step in run.validation_steps) >= patience


def _first_loss(run: Run) -> list[Check]:
    expected = loss_at_reference(run)
    if expected is None or run.steps[:1] != [1]:
        return []
    value, name = expected
    first = run.metrics["loss"][0]
    text = f"loss at step 1 is {first:.6f}"
    if abs(first - value) <= FIRST_LOSS_TOLERANCE * value:
        return [Check("good", f"{text}, {name} = {value:.6f}: the policy starts as its reference")]
    return [Check("warn", f"{text}, not {name} = {value:.6f}: the policy did not start as its reference")]


def _not_finite(run: Run) -> list[Check]:
    found = []
    for key, values in run.metrics.items():
        steps = [step for step, value in zip(run.steps, values, strict=True) if not math.isfinite(value)]
        if steps:
            found.append(
                Check("warn", f"{key} is missing or not finite in {_steps(len(steps))} (first: step {steps[0]})")
            )
    return found


def _clipping(run: Run) -> list[Check]:
    clip = run.settings.get("optim.clip_grad_norm")
    if not isinstance(clip, int | float) or clip <= 0 or not run.steps:
        return []
    num_clipped = sum(value > clip for value in run.metrics["grad_norm"])
    return [
        Check("note", f"the gradient was clipped to norm {number(clip)} in {num_clipped} of {len(run.steps)} steps")
    ]


def _skill_row(skill: str, scores: list[Score | None]) -> SkillRow:
    cells = [(f"{100 * s.correct / s.total:.1f}", _counts(s)) if s else None for s in scores]
    before, after = scores[:2]
    if before is None or after is None:
        return SkillRow(skill, cells, "", "", False)
    low, high = difference_interval(before, after)
    change = 100 * (after.correct / after.total - before.correct / before.total)
    return SkillRow(skill, cells, f"{change:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", low > 0 or high < 0)


def _counts(score: Score) -> str:
    return f"{score.correct}/{score.total}" + (f", {score.cut} cut" if score.cut else "")


def _wilson(score: Score, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, n = score.correct / score.total, score.total
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def _held_out(run: Run) -> Fact:
    after = sum(run.skills.values(), Score(0, 0))
    name, value = "held-out accuracy", f"{100 * after.correct / after.total:.1f}%"
    if set(run.base_skills) != set(run.skills):
        return Fact(name, value, _counts(after))
    before = sum(run.base_skills.values(), Score(0, 0))
    return Fact(name, f"{100 * before.correct / before.total:.1f} → {value}", f"base → trained, {_counts(after)}")


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _change(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}"


def _mean(values: Sequence[float]) -> float:
    """Of the finite values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _total(values: Sequence[float]) -> float:
    return sum(value for value in values if math.isfinite(value))
