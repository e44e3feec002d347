"""Scores of a benchmark, their errors, and what changed from the base.

A question's score is the mean over its samples; a benchmark's is the mean over its questions. Samples of one question
are not independent, so that the standard error is that of the questions' scores (clustered by question).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from tools.eval.answers import Answers, Mark
from tools.eval.benchmarks import IN_DOMAIN, INSTRUCTIONS, OUT_OF_DOMAIN
from tools.eval.ifeval import FOLLOWED, NOT
from tools.eval.questions import Items
from tools.pairs import math_text
from tools.pairs.grade import NO_ANSWER, TIMEOUT, UNDECIDED

GROUPS = (IN_DOMAIN, OUT_OF_DOMAIN, INSTRUCTIONS)
GROUP_SIZES = {IN_DOMAIN: 6, OUT_OF_DOMAIN: 2, INSTRUCTIONS: 1}


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, its standard error, and the 95 % interval by Student's t; None below two values."""

    mean: float
    error: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.error is None:
            return None
        half = t_quantile(self.count - 1) * self.error
        return self.mean - half, self.mean + half


def estimate(values: Sequence[float]) -> Estimate:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def t_quantile(degrees: int, level: float = 0.975) -> float:
    """Student's t quantile: exact for one and two degrees of freedom, otherwise within 0.2 % (Cornish-Fisher)."""
    if degrees == 1:
        return math.tan(math.pi * (level - 0.5))
    if degrees == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def pass_at(right: int, samples: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(marks: Sequence[Mark]) -> float:
    """1 if the most frequent answer is right; between equally frequent ones a draw. Right answers are one answer."""
    votes = Counter("\0right" if mark.right else _spelling(mark) for mark in marks if mark.verdict != NO_ANSWER)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [name for name, count in votes.items() if count == most]
    return ("\0right" in leaders) / len(leaders)


def _spelling(mark: Mark) -> str:
    return math_text.squeeze(math_text.clean(mark.extracted or ""))


def by_question(answers: Answers, asked: Items) -> dict[str, list[Mark]]:
    """The answered samples of every question of a benchmark that has any."""
    name, found = asked.benchmark.name, dict[str, list[Mark]]()
    for identifier in asked.items:
        marks = [answers.marks.get((f"{name}/{identifier}", sample)) for sample in range(answers.plan.repeats[name])]
        answered = [mark for mark in marks if mark is not None and not mark.missing]
        if answered:
            found[identifier] = answered
    return found


def scores(marks: Mapping[str, Sequence[Mark]]) -> dict[str, float]:
    return {name: fmean(mark.right for mark in found) for name, found in marks.items()}


def summarize(answers: Answers, asked: Items) -> dict[str, Any]:
    """One benchmark's numbers, as evaluation.json holds them; accuracies are fractions."""
    marks, repeats = by_question(answers, asked), answers.plan.repeats[asked.benchmark.name]
    every = [mark for found in marks.values() for mark in found]
    missing = Counter[str]()
    for identifier in asked.items:
        for sample in range(repeats):
            mark = answers.marks.get((f"{asked.benchmark.name}/{identifier}", sample))
            missing["pending" if mark is None else mark.missing] += mark is None or bool(mark.missing)
    row: dict[str, Any] = {
        "title": asked.benchmark.title,
        "group": asked.benchmark.group,
        "questions": len(asked.items),
        "repeats": repeats,
        "answered": len(every),
        "missing": {reason: count for reason, count in missing.items() if count},
        "dropped": dict(asked.dropped),
        "file": str(asked.path),
        "digest": asked.digest,
    }
    if not every:
        return row | {"accuracy": None}
    found = estimate(list(scores(marks).values()))
    row |= {"accuracy": found.mean, "standard_error": found.error, "interval": found.interval}
    row |= {name: sum(test(mark) for mark in every) / len(every) for name, test in SHARES.items()}
    row["tokens"] = fmean(mark.tokens for mark in every)
    row |= _of_repeats(marks, repeats, asked)
    if asked.benchmark.grader == "ifeval":
        row |= _instruction_levels(every)
    return row


SHARES = {
    "undecided": lambda mark: mark.verdict in (UNDECIDED, TIMEOUT),
    "no_answer": lambda mark: mark.verdict == NO_ANSWER,
    "cut": lambda mark: mark.finish == "length",
}


def _of_repeats(marks: Mapping[str, Sequence[Mark]], repeats: int, asked: Items) -> dict[str, Any]:
    """pass@k for k = 2, 4, ... and majority, over the questions whose samples are all there."""
    whole = [found for found in marks.values() if len(found) == repeats]
    if repeats < 2 or not whole:
        return {}
    powers = [2**power for power in range(1, repeats.bit_length()) if 2**power < repeats]
    passed = {
        str(k): fmean(pass_at(sum(m.right for m in found), repeats, k) for found in whole) for k in [*powers, repeats]
    }
    voted = all(item.grader in ("math", "letter") for item in asked.items.values())
    return {"pass_at": passed} | ({"majority_at": {str(repeats): fmean(map(majority, whole))}} if voted else {})


def _instruction_levels(every: Sequence[Mark]) -> dict[str, float]:
    """IFEval's four numbers; the accuracy above is the first of them, which the paper reports."""
    marks = [mark.extracted or "" for mark in every]
    instructions = "".join(marks)
    return {
        "prompt_strict": fmean(set(found) == {FOLLOWED} for found in marks),
        "prompt_loose": fmean(NOT not in found for found in marks),
        "instruction_strict": instructions.count(FOLLOWED) / max(1, len(instructions)),
        "instruction_loose": 1 - instructions.count(NOT) / max(1, len(instructions)),
    }


def compare(base: Answers, model: Answers, asked: Items) -> dict[str, Any] | None:
    """Trained minus base over the questions that both answered, paired by question; None if there are none."""
    before, after = (scores(by_question(answers, asked)) for answers in (base, model))
    both = [name for name in after if name in before]
    if not both:
        return None
    found = estimate([after[name] - before[name] for name in both])
    return {"difference": found.mean, "standard_error": found.error, "interval": found.interval, "questions": len(both)}


def averages(benchmarks: Mapping[str, Mapping[str, Any]], value: str = "accuracy") -> dict[str, dict[str, Any]]:
    """Means over the paper's benchmarks, as in its table: by group, and `overall` over all of them.

    `of` is how many benchmarks the paper's mean has; the error takes the benchmarks as independent.
    """
    found = {}
    for name in (*GROUPS, "overall"):
        rows = [
            row
            for row in benchmarks.values()
            if row.get(value) is not None and row["group"] in (GROUPS if name == "overall" else (name,))
        ]
        if rows:
            errors = [row["standard_error"] for row in rows if row.get("standard_error") is not None]
            error = math.sqrt(sum(e * e for e in errors)) / len(rows) if len(errors) == len(rows) else None
            of = GROUP_SIZES.get(name, sum(GROUP_SIZES.values()))
            found[name] = {
                value: fmean(row[value] for row in rows),
                "standard_error": error,
                "benchmarks": len(rows),
                "of": of,
            }
    return found
