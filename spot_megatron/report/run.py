"""Reads a run folder. Missing and damaged files are skipped and listed in `Run.problems`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spot_megatron.errors import CheckpointError

METRICS = (
    "loss",
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "reward_shift",
    "grad_norm",
    "lr",
    "pairs",
    "tokens",
    "unique_tokens",
    "seconds",
)
VALIDATION_METRICS = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "probe_change")


@dataclass(frozen=True)
class Score:
    """Graded responses to one skill's questions."""

    correct: int
    total: int
    cut: int = 0  # reached the token limit

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.total + other.total, self.cut + other.cut)


Skills = dict[str, Score]


@dataclass(frozen=True)
class Run:
    """A run folder's content. Missing numbers are NaN."""

    folder: Path
    steps: list[int]  # increasing
    metrics: dict[str, list[float]]  # one value a step, for every name of METRICS
    warnings: dict[str, list[int]]  # the steps of every named warning of train/watch.py
    recipe_text: str
    settings: dict[str, Any]  # the recipe's values by dotted key
    environment: dict[str, Any]  # by dotted key
    reference: list[tuple[float, float]]  # log-probability sums (chosen, rejected) in nats, one a pair
    dropped: dict[str, int] | None  # pairs left out before training, by reason; None where dropped.json is missing
    base_skills: Skills
    skills: Skills
    problems: list[str]
    validation_steps: list[int] = field(default_factory=list)  # increasing, from 0
    validation: dict[str, list[float]] = field(default_factory=dict)  # of VALIDATION_METRICS, those that it has

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def steps_per_epoch(self) -> int | None:
        """From the number of pairs in the reference pass; None where that or the recipe is missing."""
        batch_pairs = self._count("train.batch_pairs")
        return math.ceil(len(self.reference) / batch_pairs) if self.reference and batch_pairs else None

    @property
    def best_step(self) -> int | None:
        """The validated step that validation.keep_best exports."""
        keep_best = str(self.settings.get("validation.keep_best"))
        key = "probe_change" if keep_best == "probe" else keep_best
        sign = -1 if key == "loss" else 1
        values = zip(self.validation.get(key, []), self.validation_steps, strict=False)
        scores = [(sign * value, -step) for value, step in values if step > 0 and math.isfinite(value)]
        return -max(scores)[1] if scores else None

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run."""
        epochs, max_steps = self._count("train.epochs"), self._count("train.max_steps")
        if not self.steps_per_epoch or not epochs:
            return None
        planned = epochs * self.steps_per_epoch
        return min(planned, max_steps) if max_steps else planned

    def _count(self, key: str) -> int | None:
        value = self.settings.get(key)
        return value if type(value) is int and value > 0 else None


def read_run(folder: Path) -> Run:
    """Reads the folder of a training run.

    Raises:
        CheckpointError: the folder holds neither recipe.yaml nor metrics.jsonl.
    """
    if not any((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        inside = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
        hint = f" Runs inside it: {', '.join(inside)}." if inside else ""
        raise CheckpointError(
            f"{folder} is not a run: it has neither recipe.yaml nor metrics.jsonl.{hint} "
            "Give the folder that `make train` writes, the recipe's `output`"
        )
    problems: list[str] = []
    rows = _read_rows(folder / "metrics.jsonl", "step", problems)
    by_step = {row["step"]: row for row in rows if type(row["step"]) is int}
    if len(by_step) < len(rows):
        problems.append(
            f"metrics.jsonl: {len(rows) - len(by_step)} rows have no whole step number or one that comes again; "
            "the last row of a step counts"
        )
    steps = sorted(by_step)
    recipe_text = _read_text(folder / "recipe.yaml", problems)
    validations = _read_validations(folder / "validation.jsonl", problems)
    base_skills, skills = _read_evaluation(folder / "evaluation.json", problems)
    return Run(
        folder=folder,
        steps=steps,
        metrics={key: [_number(by_step[step].get(key)) for step in steps] for key in METRICS},
        warnings=_read_warnings(by_step) | _read_warnings(validations),
        recipe_text=recipe_text,
        settings=_flatten(_parse_recipe(recipe_text, problems)),
        environment=_flatten(_read_json(folder / "environment.json", problems)),
        reference=[
            (_number(row["logp_chosen"]), _number(row.get("logp_rejected")))
            for row in _read_rows(folder / "reference.jsonl", "logp_chosen", problems)
        ],
        dropped=_read_dropped(folder / "dropped.json", problems),
        base_skills=base_skills,
        skills=skills,
        problems=problems,
        validation_steps=list(validations),
        validation={
            key: [_number(row.get(key)) for row in validations.values()]
            for key in VALIDATION_METRICS
            if any(key in row for row in validations.values())
        },
    )


def _read_validations(path: Path, problems: list[str]) -> dict[int, dict[str, Any]]:
    """The validations by step, in order. The file is optional."""
    rows = _read_rows(path, "step", problems) if path.is_file() else []
    by_step = {row["step"]: row for row in rows if type(row["step"]) is int}
    return dict(sorted(by_step.items()))


def _read_warnings(by_step: dict[int, dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for step in sorted(by_step):
        names = by_step[step].get("warnings")
        for name in names if isinstance(names, list) else []:
            found.setdefault(str(name), []).append(step)
    return found


def _read_text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_rows(path: Path, key: str, problems: list[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects with `key`; a killed writer may leave a last line that is not."""
    rows, damaged = [], []
    for number, line in enumerate(_read_text(path, problems).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and key in row:
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        problems.append(
            f"{path.name}: {len(damaged)} of {len(rows) + len(damaged)} lines left out, "
            f"no JSON object with {key!r} (first: line {damaged[0]})"
        )
    return rows


def _read_json(path: Path, problems: list[str]) -> Any:
    text = _read_text(path, problems)
    try:
        return json.loads(text) if text else {}
    except ValueError as error:
        problems.append(f"{path.name} is not JSON ({error})")
        return {}


def _parse_recipe(text: str, problems: list[str]) -> Any:
    try:
        return yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        problems.append("recipe.yaml is not YAML; it is shown unparsed")
        return {}


def _read_dropped(path: Path, problems: list[str]) -> dict[str, int] | None:
    """Counts of {reason: [pair ids]}. The file is optional: runs of 0.1 have none."""
    if not path.is_file():
        return None
    num_problems = len(problems)
    dropped = _read_json(path, problems)
    if len(problems) > num_problems:
        return None
    if isinstance(dropped, dict) and all(isinstance(ids, list) for ids in dropped.values()):
        return {reason: len(ids) for reason, ids in dropped.items()}
    problems.append("dropped.json has not the shape {reason: [ids]}; left out")
    return None


def _read_evaluation(path: Path, problems: list[str]) -> tuple[Skills, Skills]:
    """The output of `tools.eval --json`: {"base": result or null, "model": result}. The file is optional."""
    if not path.is_file():
        return {}, {}
    result = _read_json(path, problems)
    try:
        base, model = result.get("base"), result["model"]
        return _skills(base) if base else {}, _skills(model)
    except (AttributeError, KeyError, TypeError, ValueError):
        problems.append("evaluation.json has not the shape that `python -m tools.eval --json` prints; left out")
        return {}, {}


def _skills(result: dict[str, Any]) -> Skills:
    scores = {
        str(name): Score(int(score["correct"]), int(score["total"]), int(score.get("cut", 0)))
        for name, score in result["skills"].items()
    }
    if any(not 0 <= score.correct <= score.total or score.total == 0 for score in scores.values()):
        raise ValueError
    return scores


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one with dotted keys. Anything else than a mapping gives an empty one."""
    if not isinstance(value, dict):
        return {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
