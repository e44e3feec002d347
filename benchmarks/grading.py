"""False wrong, false correct and undecided of three graders on the table of answer forms that the tests use.

    python -m benchmarks.grading [--output benchmarks/results/grading.md]

The graders: tools.pairs.grade; math-verify alone with its defaults; and the rule of the public reference as described:
the first closing brace ends the box, then strings are compared, either exactly or without backslashes, spaces and case.
A false wrong is a right answer called wrong, which would be trained against.
"""

import argparse
import datetime
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from spot_megatron.files import write_text
from tools.pairs.grade import CORRECT, UNDECIDED, WRONG, Grader, clean_gold

TABLE = Path(__file__).parent.parent / "tests/tools/pairs/data/grading_table.tsv"
_REFERENCE_BOX = re.compile(r"\\boxed\{([^}]+)\}")


def read_table(path: Path) -> list[tuple[bool, str, str]]:
    """(whether the answer is right, known answer, response) of every row that holds an answer."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [
        (code.startswith("C"), gold, response if "boxed" in response else rf"So the result is $\boxed{{{response}}}$.")
        for code, gold, response in lines
        if code != "N"
    ]


def reference_rule(normalise: Callable[[str], str]) -> Callable[[str, str], str]:
    def decide(response: str, gold: str) -> str:
        found = _REFERENCE_BOX.findall(response)
        return CORRECT if found and normalise(found[-1].strip()) == normalise(gold) else WRONG

    return decide


def math_verify_alone(response: str, gold: str) -> str:
    return CORRECT if verify(parse(rf"\boxed{{{clean_gold(gold)}}}"), parse(response)) else WRONG


def count(rows: list[tuple[bool, str, str]], decide: Callable[[str, str], str]) -> tuple[Counter[str], float]:
    """How often each kind of outcome occurs, and the wall time in seconds."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for right, gold, response in rows:
        verdict = decide(response, gold)
        if verdict == CORRECT:
            counts["right" if right else "false correct"] += 1
        elif verdict == WRONG:
            counts["false wrong" if right else "right"] += 1
        else:
            counts["undecided, right" if right else "undecided, wrong"] += 1
            assert verdict == UNDECIDED, (verdict, gold, response)
    return counts, time.perf_counter() - started


def report(rows: list[tuple[bool, str, str]]) -> str:
    grader = Grader()
    grader.grade(r"\boxed{x+1}", "1+x")  # its worker's start is not counted
    graders: dict[str, Callable[[str, str], str]] = {
        "this grader": lambda response, gold: grader.grade(response, gold).verdict,
        "math-verify alone": math_verify_alone,
        "reference's rule, exact": reference_rule(str),
        "reference's rule, loose": reference_rule(lambda text: re.sub(r"[\\\s]", "", text).lower()),
    }
    columns = ("false wrong", "false correct", "undecided, right", "undecided, wrong", "right")
    lines = [
        "# Graders on the table of answer forms",
        "",
        f"{len(rows)} answers ({sum(right for right, _, _ in rows)} right, {sum(not row[0] for row in rows)} wrong); "
        f"{datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores shared with other jobs, Python "
        f"{platform.python_version()}. By `python -m benchmarks.grading`.",
        "The table was written for the tests of this grader and covers the kinds of spelling that public reports name;",
        "it was not sampled from a model, and a test keeps this grader's false verdicts on it at 0, so they say",
        "nothing about other answers. math-verify has no third verdict: what it cannot parse is False.",
        "",
        "| grader | " + " | ".join(columns) + " | seconds |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for name, decide in graders.items():
        counts, seconds = count(rows, decide)
        lines.append(f"| {name} | " + " | ".join(str(counts[column]) for column in columns) + f" | {seconds:.1f} |")
    grader.close()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--output", type=Path, help="also write the result there")
    args = parser.parse_args()
    text = report(read_table(args.table))
    print(text, end="")
    if args.output:
        write_text(args.output, text)


if __name__ == "__main__":
    main()
